"""Actions under way, by model and by node."""

from __future__ import annotations

from dataclasses import replace

from scaler.books.snapshot_name import SnapshotName
from scaler.plan.actions import End, Pin, Stage, Start
from scaler.plan.rungs import Rung
from scaler.plan.under_way import UnderWay

NAME = SnapshotName("ns", "chat")
STAGE = Stage("a", "chat", NAME, "d", Rung.MEMORY, "why")
PIN = Pin("a", "chat", NAME, "d", Rung.DISK, "why")
START, END = Start("chat", "", "why", 2), End("mail", "b", "r", "why")


def test_those_of_a_model_and_of_a_node_in_their_order() -> None:
    found = UnderWay((END, STAGE, START, PIN))
    assert found == (END, STAGE, START, PIN)
    assert (list(found.of_model("chat")), list(found.of_model("none"))) == ([STAGE, START, PIN], [])
    assert (list(found.at("a")), list(found.at("")), list(found.at("none"))) == ([STAGE, PIN], [START], [])
    assert UnderWay.of(found) is found


def test_one_of_them_is_known_whatever_its_reason() -> None:
    found = UnderWay((END, STAGE, START, PIN))
    assert all(action in found for action in (END, START, replace(STAGE, reason="another"), replace(PIN, model="of the same snapshot")))
    assert replace(STAGE, rung=Rung.DISK) not in found and replace(END, node="a") not in found
