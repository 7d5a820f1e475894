"""Where the time of a sequence went: nothing is lost, and the rest is shown."""

import time

import pytest

from restore_agent.sequences.phases import Phases
from zerowake_shared.phases import Phase


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


def test_when_a_phase_was_is_told_beside_what_it_took() -> None:
    phases = Phases()
    begin = time.monotonic()
    with phases.phase(Phase.IMAGE_SANDBOX):
        pass
    phases.add(Phase.IMAGE_FILL, 0.0)
    phases.add(Phase.IMAGE_CRIU, 0.0, begin)  # the other two were done meanwhile
    phases.add(Phase.CUDA_RESTORE, 0.0, ended_before=0.0)
    phases.add(Phase.IMAGE_FILL, 0.0)
    spans = phases.spans()
    assert set(spans) == {name for name, _ in phases.done()}
    assert spans[Phase.IMAGE_CRIU][0] <= spans[Phase.IMAGE_SANDBOX][0] <= spans[Phase.IMAGE_SANDBOX][1] <= spans[Phase.IMAGE_FILL][0]
    assert spans[Phase.IMAGE_CRIU][1] <= spans[Phase.IMAGE_FILL][1], "it ended last when it was told last"
    first, last = spans[Phase.UNACCOUNTED]
    assert first == 0.0 <= min(begins for begins, _ in spans.values())
    assert max(ends for _, ends in spans.values()) == last
