"""Where the time of a sequence went: nothing is lost, and the rest is shown."""

import pytest

from restore_agent.sequences.phases import Phases


def test_phases_are_in_the_order_they_ended_and_the_rest_is_last() -> None:
    phases = Phases()
    with phases.phase("image"):
        pass
    phases.add("weights", 2.0)
    phases.add("weights", 1.0)
    assert phases.seconds("weights") == 3.0 and phases.seconds("cuda") == 0.0
    assert [name for name, _ in phases.done()] == ["image", "weights", "unaccounted"]


def test_a_phase_that_fails_is_counted_too() -> None:
    phases = Phases()
    with pytest.raises(RuntimeError), phases.phase("image"):
        raise RuntimeError
    assert [name for name, _ in phases.done()] == ["image", "unaccounted"]


def test_what_nothing_accounts_for_is_never_less_than_nothing() -> None:
    phases = Phases()
    phases.add("image", 1e6)  # phases that ran beside each other take more than there was
    assert phases.done()[-1] == ("unaccounted", 0.0)
