"""What can go wrong, as the server says it and the client raises it: one class a reason of the protocol."""

from __future__ import annotations

from typing import ClassVar

from zerowake_proto import gpumem_pb2 as pb


class GpumemError(Exception):
    """The message says what happened, to what, and what to do."""

    reason: ClassVar[pb.Error.Reason] = pb.Error.REASON_UNSPECIFIED


class Invalid(GpumemError):
    reason = pb.Error.INVALID


class VersionMismatch(GpumemError):
    reason = pb.Error.VERSION


class NotFound(GpumemError):
    reason = pb.Error.NOT_FOUND


class NotSealed(GpumemError):
    reason = pb.Error.NOT_SEALED


class Exists(GpumemError):
    reason = pb.Error.EXISTS


class OutOfMemory(GpumemError):
    reason = pb.Error.OUT_OF_MEMORY


class WrongDevice(GpumemError):
    reason = pb.Error.WRONG_DEVICE


class StaleLayout(GpumemError):
    reason = pb.Error.STALE_LAYOUT


class Corrupt(GpumemError):
    reason = pb.Error.CORRUPT


class StillMapped(GpumemError):
    reason = pb.Error.STILL_MAPPED


class Forbidden(GpumemError):
    reason = pb.Error.FORBIDDEN


class Cancelled(GpumemError):
    reason = pb.Error.CANCELLED


class FillerLost(GpumemError):
    reason = pb.Error.FILLER_LOST


class ShuttingDown(GpumemError):
    reason = pb.Error.SHUTTING_DOWN


class PeerGone(GpumemError):
    """The other end of the connection is gone, or does not answer. Memory that is mapped stays valid."""


_BY_REASON = {found.reason: found for found in GpumemError.__subclasses__() if found.reason}


def to_message(error: GpumemError) -> pb.Error:
    return pb.Error(reason=error.reason, message=str(error))


def from_message(message: pb.Error) -> GpumemError:
    return _BY_REASON.get(message.reason, GpumemError)(message.message)
