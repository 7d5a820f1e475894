"""A captured snapshot as the cluster's nodes hold it: whose word counts, and for how long."""

import msgspec

from scaler.books.snapshot_name import SnapshotName
from scaler.kubernetes.artifact import ABSENT_AGENT_SECONDS, UNKNOWN, Absences, Artifact
from scaler.kubernetes.resources import Location, ModelSnapshot
from scaler.plan.rungs import Rung
from scaler.plan.world import Node, Residency
from tests.worlds.virtual_time import StandingClock

DIGEST, OTHER = "ab" * 32, "cd" * 32
SNAPSHOT = msgspec.convert({"metadata": {"namespace": "team", "name": "chat", "uid": "u"}, "spec": {}}, ModelSnapshot)


def node(name: str, digest: str = "", *, synced: bool = True) -> Node:
    residencies = {SnapshotName("team", "chat"): Residency(digest, Rung.MEMORY, 10)} if digest else {}
    return Node(f"{name}:1", name, synced=synced, residencies=residencies)


def test_nodes_hold_it_by_its_digest() -> None:
    found = Artifact(SNAPSHOT, DIGEST, [node("a", DIGEST), node("b", OTHER), node("c")])
    assert found.held.keys() == {"a"}
    assert found.answering.keys() == {"a", "b", "c"}


def test_without_a_digest_each_of_that_name_counts() -> None:
    assert Artifact(SNAPSHOT, "", [node("a", DIGEST), node("b", OTHER), node("c")]).held.keys() == {"a", "b"}


def test_who_has_not_said_everything_yet_cannot_be_asked_and_who_has_no_name_is_nobody() -> None:
    found = Artifact(SNAPSHOT, DIGEST, [node("a", DIGEST, synced=False), node("", DIGEST)])
    assert found.held.keys() == {"a"}, "what was heard of it last"
    assert not found.answering


def test_what_an_agent_said_holds_over_its_restart_and_no_longer() -> None:
    clock = StandingClock()
    absences = Absences(clock)
    holders = (Location("a", "memory"), Location("b", "disk"))
    there = Artifact(SNAPSHOT, DIGEST, [node("a", DIGEST), node("b", DIGEST)])
    away = Artifact(SNAPSHOT, DIGEST, [node("a", DIGEST), node("b", DIGEST, synced=False)])
    assert absences.aged(holders, there) == holders
    assert absences.aged(holders, away) == holders
    clock.moment = 5.0
    assert absences.aged(holders, there) == holders, "it was only restarted"
    assert absences.aged(holders, away) == holders
    clock.moment += ABSENT_AGENT_SECONDS
    assert absences.aged(holders, away) == (Location("a", "memory"), Location("b", UNKNOWN))
    assert absences.aged(holders, there) == holders
