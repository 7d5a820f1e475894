"""Which of a model's replicas gets a request, and which of them count."""

from __future__ import annotations

import asyncio

import pytest

from scaler.books.fairness import Priority
from scaler.gateway.member import Backend, Member
from scaler.gateway.places import WholeReplicas
from scaler.gateway.pool import Hold, Pool
from scaler.gateway.upstream import Endpoint


class Few(WholeReplicas):
    """Places that another gateway has: those of these replicas."""

    def __init__(self, *taken: str) -> None:
        self._taken = taken

    def room(self, replica: str, concurrency: int, in_flight: int) -> int:
        return 0 if replica in self._taken else super().room(replica, concurrency, in_flight)


@pytest.fixture
async def pool() -> Pool:
    """Of three replicas, with one, two and three requests."""
    pool = Pool("m")
    for count, name in enumerate("abc", 1):
        member = pool.members[name] = Member(Backend(name, "m", Endpoint("127.0.0.1", 1)), pool)
        member.in_flight = count
    return pool


async def test_the_least_busy_one_with_a_place_is_free(pool: Pool) -> None:
    assert pool.free(WholeReplicas(), 4) is pool.members["a"]
    assert pool.free(WholeReplicas(), 1) is None
    assert pool.free(Few("a"), 4) is pool.members["b"]
    assert pool.free(Few("a", "b", "c"), 4) is None
    pool.members["a"].rests = True
    assert pool.free(WholeReplicas(), 4) is pool.members["b"]
    pool.members["b"].probe = asyncio.create_task(asyncio.sleep(0))  # a suspect
    assert pool.free(WholeReplicas(), 4) is pool.members["c"]
    await pool.members["b"].probe


async def test_what_counts_is_what_takes_requests_or_will(pool: Pool) -> None:
    assert (pool.ready, pool.unreachable) == (3, 0)
    pool.members["a"].unready = pool.members["a"].unreachable = True
    assert (pool.ready, pool.unreachable) == (2, 1)
    pool.members["a"].ending = pool.members["b"].ending = True
    assert (pool.ready, pool.unreachable) == (1, 0), "those that go are not wanted there"


async def test_who_has_left_the_line_is_not_timed_any_more(pool: Pool) -> None:
    expired: list[str] = []
    hold = Hold(pool, "tenant", Priority.NORMAL, 10)
    hold.timer = asyncio.get_running_loop().call_later(0, expired.append, "it")
    assert hold.waiting
    hold.settle()
    hold.settle()
    await asyncio.sleep(0.01)
    assert (hold.waiting, hold.timer, expired) == (False, None, [])
