"""What parked engines may hold of each GPU: counted, refused beyond it, and none of others' GPUs."""

from __future__ import annotations

import pytest

from restore_agent.sequences.parked_budget import ParkedBudget, ParkedFull, a_tenth

GIB = 1 << 30


class Gpus:
    """Two of 80 and 40 GiB, and what is parked on them."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.budget = ParkedBudget(a_tenth, lambda: {"GPU-1": 80 * GIB, "GPU-2": 40 * GIB}, lambda: self.held)


def test_a_tenth_of_each_gpu_is_left_less_what_is_held() -> None:
    gpus = Gpus()
    assert gpus.budget.left() == {"GPU-1": 8 * GIB, "GPU-2": 4 * GIB}
    gpus.held = {"GPU-1": 3 * GIB, "GPU-2": 5 * GIB}
    assert gpus.budget.left() == {"GPU-1": 5 * GIB, "GPU-2": 0}


def test_what_is_larger_than_any_gpu_has_left_is_refused_with_both_figures() -> None:
    gpus = Gpus()
    gpus.budget.check([8 * GIB, GIB])
    with pytest.raises(ParkedFull, match=r"holds 8193 MiB of a GPU, and parked engines may hold 8192 MiB more at most: .*--parked-bytes"):
        gpus.budget.check([GIB, 8 * GIB + (1 << 20)])


def test_each_of_several_ranks_needs_room_on_a_gpu_of_its_own() -> None:
    gpus = Gpus()
    gpus.budget.check([4 * GIB, 8 * GIB])
    with pytest.raises(ParkedFull, match=r"holds 5120 MiB of a GPU, and parked engines may hold 4096 MiB more"):
        gpus.budget.check([5 * GIB, 5 * GIB])
    with pytest.raises(ParkedFull, match=r"may hold 0 MiB more"):
        gpus.budget.check([GIB, GIB, GIB])


def test_an_engine_that_runs_must_find_its_room_where_it_is() -> None:
    gpus = Gpus()
    gpus.budget.check_there({"GPU-1": 5 * GIB})
    with pytest.raises(ParkedFull, match="may hold 4096 MiB more"):
        gpus.budget.check_there({"GPU-2": 5 * GIB})


def test_what_is_being_parked_counts_until_it_is_or_is_not() -> None:
    gpus = Gpus()
    with pytest.raises(ZeroDivisionError), gpus.budget.counted({"GPU-1": 6 * GIB}):
        assert gpus.budget.left()["GPU-1"] == 2 * GIB
        with pytest.raises(ParkedFull):
            gpus.budget.check_there({"GPU-1": 3 * GIB})
        raise ZeroDivisionError
    assert gpus.budget.left()["GPU-1"] == 8 * GIB


def test_nothing_is_parked_on_a_gpu_that_others_have_until_they_have_it_no_more() -> None:
    gpus = Gpus()
    gpus.budget.others_have({"GPU-1"})
    assert gpus.budget.left() == {"GPU-1": 0, "GPU-2": 4 * GIB}
    gpus.budget.others_have(set())
    assert gpus.budget.left() == {"GPU-1": 8 * GIB, "GPU-2": 4 * GIB}


def test_without_a_gpu_nothing_is_counted() -> None:
    budget = ParkedBudget(a_tenth, dict, dict)
    budget.check([])
    budget.check_there({})
    assert budget.left() == {}
