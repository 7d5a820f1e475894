"""Leases: each has a number of its own, and says who has it."""

from __future__ import annotations

from gpumem.server.leases import Lease, Owner
from gpumem.server.pool import Slab


def test_a_lease_is_as_large_as_its_slabs() -> None:
    owner = Owner("", 1, "")
    one, other = (Lease(owner, "host", [Slab(-1, 10), Slab(-1, 20)]) for _ in range(2))
    assert one.size == 30
    assert one.number != other.number
    assert one != other


def test_an_owner_is_told_by_what_people_can_look_up() -> None:
    assert str(Owner("", 17, "vllm")) == "vllm (pid 17)"
    assert str(Owner("red", 17, "")) == "process (pid 17, namespace red)"
