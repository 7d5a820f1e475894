"""Errors: each reason of the protocol is a class, on both sides."""

from __future__ import annotations

from zerowake_proto import gpumem_pb2 as pb

from gpumem.wire import errors
from gpumem.wire.errors import GpumemError, PeerGone, from_message, to_message


def test_every_reason_has_its_class_and_comes_back_as_it() -> None:
    for reason in pb.Error.Reason.values():
        raised = from_message(pb.Error(reason=reason, message="what happened"))
        assert (raised.reason, str(raised)) == (reason, "what happened")
        assert to_message(raised) == pb.Error(reason=reason, message="what happened")
        assert (type(raised) is GpumemError) == (reason == pb.Error.REASON_UNSPECIFIED)


def test_every_class_says_what_it_is() -> None:
    classes = [found for found in vars(errors).values() if isinstance(found, type) and issubclass(found, GpumemError)]
    assert len(classes) == len(pb.Error.Reason.values()) + 1  # PeerGone is never sent
    assert all(found.__doc__ for found in classes)


def test_a_reason_of_a_later_version_is_an_error_all_the_same() -> None:
    assert type(from_message(pb.Error(reason=99, message="new"))) is GpumemError  # type: ignore[arg-type]
    assert PeerGone.reason == pb.Error.REASON_UNSPECIFIED
