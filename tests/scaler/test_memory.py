"""Bins: running models come first, idle weights leave by their worth, and find another bin of the node where they may."""

from __future__ import annotations

from scaler.simulate.memory import NOWHERE, Memory


def memory(*, by_bytes: bool = True, pool: bool = True, host: float = 20) -> Memory:
    """One node with two GPUs of 100, models of 10 to 60."""
    sizes = [10.0, 20.0, 30.0, 60.0, 60.0]
    return Memory(1, 2, 100, host, sizes, sizes, pool=pool, by_bytes=by_bytes)


def test_room_is_taken_from_the_worst() -> None:
    found = memory()
    for model in (0, 1, 3):
        found.put(model, 0)
    assert found.free[0] == 10
    assert found.take(35, 0, [3.0, 1.0, 0.0, 2.0]) == [1, 3]  # 20 are not enough, with 10 that were free
    assert (found.where[0], found.where[1], found.free[0], found.open[0]) == (0, NOWHERE, 55, 65)
    found.give_back(35, 0)
    assert found.free[0] == 90


def test_a_model_runs_where_it_stands_or_where_most_is_free() -> None:
    found = memory()
    found.put(3, 0)
    assert found.room_for(70, 0, preferred=0) == 0
    assert found.room_for(70, 0) == 1
    assert found.room_for(101, 0) == NOWHERE


def test_the_bin_that_is_filled_best_comes_first() -> None:
    assert memory().place(1, 0, [1.0] * 5) == (2, [])
    assert memory(host=5).place(1, 0, [1.0] * 5) == (0, [])


def test_least_is_lost_and_a_large_one_has_to_be_worth_all_that_leave() -> None:
    found = memory(pool=False)
    found.put(0, 2)
    worth = [1.0, 0.9, 0.0, 0.0, 0.0]
    assert found.place(1, 0, worth) == (NOWHERE, [])
    assert found.place(1, 0, [1.0, 1.5, 0, 0, 0]) == (2, [0])
    assert found.place(1, 0, [1.0, 1.2, 0, 0, 0], margin=1.3) == (NOWHERE, [])
    assert found.place(3, 0, [1.0, 1.0, 0, 99.0, 0]) == (NOWHERE, [])  # it never fits


def test_an_order_is_not_added_up() -> None:
    found = memory(by_bytes=False, pool=False)
    found.put(0, 2)
    assert found.place(1, 0, [5.0, 6.0, 0, 0, 0]) == (2, [0])


def test_a_node_with_room_comes_before_one_where_something_has_to_leave() -> None:
    found = memory(pool=False)
    assert found.least_in(1, 0, [5.0, 6.0, 0, 0, 0]) == -float("inf")
    found.put(0, 2)
    assert found.least_in(1, 0, [5.0, 6.0, 0, 0, 0]) == 5


def test_who_came_since_leaves_in_turn() -> None:
    found = Memory(1, 1, 1.0, 30.0, [10.0] * 5, [10.0] * 5, pool=False, by_bytes=True)
    worth = [3.0, 2.0, 4.0, 5.0, 6.0]
    for model in (0, 1, 2):
        found.put(model, 1)
    assert found.place(3, 0, worth) == (1, [1])
    found.drop(1)
    found.put(3, 1)
    assert found.place(4, 0, worth) == (1, [0])
    assert found.place(4, 0, [3.0, 2.0, 1.0, 5.0, 6.0]) == (1, [2])
