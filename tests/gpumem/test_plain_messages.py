"""Messages without protobuf: the same bytes as protobuf's own, both ways, and nothing else is taken for a message."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError as Refused
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from zerowake_proto import gpumem_pb2 as pb

from gpumem.wire.plain_messages import DecodeError, defined
from restore_agent.kubernetes.engine_packages import table

plain: Any = defined(*table(pb.DESCRIPTOR))
NUMBERS = st.integers(0, 2**64 - 1)
WORDS, DATA = st.text(max_size=40), st.binary(max_size=200)
SMALL = st.integers(0, 2**32 - 1)
CHUNKS = st.lists(st.fixed_dictionaries({"hash": DATA, "size": NUMBERS}), max_size=5)
TENSORS = st.lists(
    st.fixed_dictionaries({"name": WORDS, "dtype": WORDS, "shape": st.lists(NUMBERS, max_size=4), "offset": NUMBERS}), max_size=5
)
SECONDS = st.floats(0, 1e9).filter(lambda value: str(value) != "-0.0")
REQUESTS: dict[str, Any] = {
    "hello": {"version": SMALL, "label": WORDS},
    "begin": {"device": WORDS, "id": DATA, "layout": DATA, "pinned": st.booleans()},
    "release": {"lease": NUMBERS},
    "status": {},
}


def layouts(of: Any, size: int, chunks: list[dict[str, Any]], tensors: list[dict[str, Any]], note: bytes) -> Any:
    """By one library or the other, as the client makes one."""
    layout = of["Layout"](size=size, note=note)
    layout.chunks.extend(of["Chunk"](**chunk) for chunk in chunks)
    for tensor in tensors:
        layout.tensors.add(**tensor)
    return layout


@given(NUMBERS, CHUNKS, TENSORS, DATA)
@settings(max_examples=200, deadline=None)
def test_a_layout_has_the_bytes_that_its_region_is_named_by(size: int, chunks: Any, tensors: Any, note: bytes) -> None:
    theirs, ours = layouts(vars(pb), size, chunks, tensors, note), layouts(plain, size, chunks, tensors, note)
    written = theirs.SerializeToString(deterministic=True)
    assert ours.SerializeToString(deterministic=True) == written
    again = plain["Layout"].FromString(written)
    assert again == ours and [list(tensor.shape) for tensor in again.tensors] == [tensor["shape"] for tensor in tensors]


@given(NUMBERS, st.sampled_from(sorted(REQUESTS)).flatmap(lambda kind: st.tuples(st.just(kind), st.fixed_dictionaries(REQUESTS[kind]))))
@settings(max_examples=200, deadline=None)
def test_a_request_is_what_protobuf_reads(number: int, asked: tuple[str, dict[str, Any]]) -> None:
    kind, fields = asked
    name = pb.Request.DESCRIPTOR.fields_by_name[kind].message_type.name
    ours = plain["Request"](id=number, **{kind: plain[name](**fields)})
    theirs = pb.Request(id=number, **{kind: getattr(pb, name)(**fields)})
    assert ours.SerializeToString() == theirs.SerializeToString(deterministic=True)
    read = plain["Request"].FromString(theirs.SerializeToString())
    assert (read.WhichOneof("request"), read.HasField(kind), read.id) == (kind, True, number)
    assert {key: getattr(getattr(read, kind), key) for key in fields} == fields


@given(st.lists(NUMBERS, max_size=10), st.booleans(), SECONDS, WORDS)
@settings(max_examples=100, deadline=None)
def test_a_reply_is_read(pieces: list[int], writable: bool, seconds: float, text: str) -> None:
    granted = pb.Reply(id=1, granted=pb.Granted(lease=2, writable=writable, pieces=pieces, layout=b"x"))
    read = plain["Reply"].FromString(granted.SerializeToString())
    assert (read.granted.lease, read.granted.writable, list(read.granted.pieces), read.granted.layout) == (2, writable, pieces, b"x")
    assert not read.HasField("error") and read.error.message == "", "what was not set is empty, and stays unset"
    assert not read.HasField("error")
    filled = plain["Reply"].FromString(pb.Reply(filled=pb.Filled(seconds=seconds)).SerializeToString())
    assert filled.filled.seconds == seconds
    failed = plain["Reply"].FromString(pb.Reply(error=pb.Error(reason=pb.Error.CORRUPT, message=text)).SerializeToString())
    assert (failed.error.reason, failed.error.message) == (plain["Error"].CORRUPT, text)


def test_one_of_several_takes_the_other_s_place() -> None:
    request = plain["Request"](hello=plain["Hello"](version=1))
    request.status = plain["GetStatus"]()
    assert request.WhichOneof("request") == "status" and not request.HasField("hello")
    assert request.SerializeToString() == pb.Request(status=pb.GetStatus()).SerializeToString()


def test_a_number_that_may_be_absent_is_written_where_it_is_zero() -> None:
    for given_ in ({}, {"files": 0}, {"files": 7, "source": 0}):
        assert plain["Step"](**given_).SerializeToString() == pb.Step(**given_).SerializeToString(), given_


def test_fields_of_a_newer_version_are_passed_over() -> None:
    newer = b"\xa2\x06\x03abc" + b"\xa8\x06\x05" + b"\xb1\x06" + bytes(8) + b"\xbd\x06" + bytes(4)
    assert plain["Hello"].FromString(newer + pb.Hello(version=3).SerializeToString()).version == 3


@given(st.binary(max_size=60))
@settings(max_examples=500, deadline=None)
def test_what_protobuf_refuses_is_refused(data: bytes) -> None:
    """But for groups, which it knows and nobody writes."""
    try:
        theirs: Message | None = pb.Layout.FromString(data)
    except Refused:
        theirs = None
    try:
        ours = plain["Layout"].FromString(data)
    except DecodeError:
        return
    assert theirs is not None, data
    assert ours.size == pb.Layout.FromString(data).size


def test_a_misspelt_field_is_an_error() -> None:
    with pytest.raises(AttributeError, match="Hello has no field 'lable'"):
        plain["Hello"](lable="x")
    with pytest.raises(AttributeError, match="no field"):
        _ = plain["Hello"]().lable
    with pytest.raises(ValueError, match="no number of 64 bits"):
        plain["Release"](lease=-1).SerializeToString()
