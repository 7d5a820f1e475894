"""What can go wrong, as the server says it and the client raises it: one class a reason of the protocol."""

from __future__ import annotations

from typing import ClassVar

from zerowake_proto import gpumem_pb2 as pb


class GpumemError(Exception):
    """The message says what happened, to what, and what to do."""

    reason: ClassVar[pb.Error.Reason] = pb.Error.REASON_UNSPECIFIED


class Invalid(GpumemError):
    """The request itself makes no sense."""

    reason = pb.Error.INVALID


class VersionMismatch(GpumemError):
    """The two sides speak different versions of the protocol."""

    reason = pb.Error.VERSION


class NotFound(GpumemError):
    """There is no such region, lease or chunk, or not for this caller."""

    reason = pb.Error.NOT_FOUND


class NotSealed(GpumemError):
    """Somebody is still writing or filling the region."""

    reason = pb.Error.NOT_SEALED


class Exists(GpumemError):
    """The region is there and sealed."""

    reason = pb.Error.EXISTS


class OutOfMemory(GpumemError):
    """The pool, the quota or the arena has no room."""

    reason = pb.Error.OUT_OF_MEMORY


class WrongDevice(GpumemError):
    """This server has no such device."""

    reason = pb.Error.WRONG_DEVICE


class StaleLayout(GpumemError):
    """The region does not hold what the caller takes it to hold."""

    reason = pb.Error.STALE_LAYOUT


class Corrupt(GpumemError):
    """A source does not have the content that its chunk's hash says."""

    reason = pb.Error.CORRUPT


class StillMapped(GpumemError):
    """Somebody can still write to memory that is to be sealed, or this process still maps what it has to let go of."""

    reason = pb.Error.STILL_MAPPED


class Forbidden(GpumemError):
    """It is the operator's to do, or somebody else's, or in use."""

    reason = pb.Error.FORBIDDEN


class Cancelled(GpumemError):
    """It was stopped, as asked."""

    reason = pb.Error.CANCELLED


class FillerLost(GpumemError):
    """The process that fills died, or does not start."""

    reason = pb.Error.FILLER_LOST


class PeerGone(GpumemError):
    """The other end of the connection is gone, or does not answer. Memory that is mapped stays valid."""


_BY_REASON = {found.reason: found for found in GpumemError.__subclasses__() if found.reason}


def to_message(error: GpumemError) -> pb.Error:
    return pb.Error(reason=error.reason, message=str(error))


def from_message(message: pb.Error) -> GpumemError:
    return _BY_REASON.get(message.reason, GpumemError)(message.message)
