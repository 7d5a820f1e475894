"""Memory that is used again."""

from __future__ import annotations

from restore_agent.transfer.spare_memory import SpareMemory


def test_what_was_given_back_is_taken_again_and_nobody_else_has_it() -> None:
    spare = SpareMemory(8192)
    one, two = spare.take(), spare.take()
    assert one is not two and len(one) == len(two) == 8192
    one[:5], two[:5] = b"first", b"other"
    assert bytes(one[:5]) == b"first"
    spare.give(one)
    assert spare.take() is one
    assert spare.take() not in (one, two)
