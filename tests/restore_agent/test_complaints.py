"""What is said of sources that did wrong while others did right."""

from __future__ import annotations

from restore_agent.snapshots.keyring import Untrusted
from restore_agent.transfer.complaints import Complaints
from restore_agent.transfer.source import Absent, Altered, Denied, Unreachable
from tests.worlds.faulty_source import FaultySource


def test_each_kind_of_each_source_is_said_once_and_how_often_it_came() -> None:
    complaints, one, other = Complaints(), FaultySource("one"), FaultySource("other")
    for number in range(3):
        complaints.about(one, Altered(f"one has other bytes under {number}"))
    complaints.about(one, Denied("one denies it"))
    complaints.about(other, Altered("other has other bytes"))
    complaints.about(other, Untrusted("other has what nobody trusts"))
    assert complaints.texts == [
        "one has other bytes under 0 (2 more of it)",
        "one denies it",
        "other has other bytes",
        "other has what nobody trusts",
    ]


def test_who_lacks_something_or_is_away_did_nothing_wrong() -> None:
    complaints = Complaints()
    complaints.about(FaultySource("one"), Absent("one does not have it"))
    complaints.about(FaultySource("one"), Unreachable("one does not answer"))
    assert complaints.texts == []


def test_of_very_many_some_are_said() -> None:
    complaints = Complaints()
    for number in range(1000):
        complaints.about(FaultySource(str(number)), Denied(f"{number} denies it"))
    assert 0 < len(complaints.texts) < 100
