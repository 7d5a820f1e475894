"""Halves of zerowake of different versions speak with each other: what was on the wire once stays what it was.

`golden/protocols.json` has what has been there. New fields, values and methods may come; `python -m tests.worlds.protocols` writes them
down, and from then on they stay, too.
"""

import json

import pytest
from zerowake_proto import agent_pb2 as pb

from tests.worlds.protocols import GOLDEN, broken, merged, protocols

GOOD = {"agent": {"message M": {"1": "string name", "2": "repeated int64 sizes"}, "service S": {"Do": "(M) → (M)"}}}


def test_nothing_of_our_protocols_has_changed() -> None:
    lines = broken(json.loads(GOLDEN.read_text()), protocols())
    assert not lines, "an older half would misread this; give the new meaning a number of its own:\n" + "\n".join(lines)


def test_what_is_new_is_written_down() -> None:
    known = json.loads(GOLDEN.read_text())
    assert merged(known, protocols()) == known, "run python -m tests.worlds.protocols, which writes down what is new"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"1": "string name"}, "agent.proto: message M, 2: was 'repeated int64 sizes', and is gone"),
        ({"1": "string name", "2": "int64 sizes"}, "message M, 2: was 'repeated int64 sizes', and is 'int64 sizes'"),
        ({"1": "string title", "2": "repeated int64 sizes"}, "message M, 1: was 'string name', and is 'string title'"),
    ],
)
def test_what_is_changed_is_named(parts: dict[str, str], said: str) -> None:
    (line,) = broken(GOOD, {"agent": GOOD["agent"] | {"message M": parts}})
    assert said in line


def test_what_is_added_breaks_nothing() -> None:
    now = {"agent": {"message M": GOOD["agent"]["message M"] | {"3": "bool new"}, "service S": {"Do": "(M) → (M)", "More": "(M) → (M)"}}}
    assert not broken(GOOD, now)
    assert merged(GOOD, now) == now


def test_what_a_newer_half_says_besides_is_passed_over() -> None:
    """A field, and a value of an enum, that this version does not know."""
    said = pb.StageRequest(rung=pb.RUNG_MEMORY).SerializeToString()
    newer = pb.StageRequest.FromString(said + b"\xfa\x7f\x03new")  # field 2047
    assert newer.rung == pb.RUNG_MEMORY
    unknown = pb.Residency.FromString(pb.Residency(image_bytes=5).SerializeToString())
    unknown.rung = 99
    again = pb.Residency.FromString(unknown.SerializeToString())
    assert (again.rung, again.image_bytes) == (99, 5)
