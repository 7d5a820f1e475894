"""The family of the agent's errors: each says its reason and its kind, and whoever answers for it follows these two.

    reason   a key of few: label of `zerowake_restore_fallbacks_total`, `fallback_reason` of a restore, trailing metadata `zerowake-reason`
    kind     whose fault it is: gRPC's status, and which event a pod gets

A class says both beside its definition, so that nobody keeps a table of other layers' errors. This module lies below all layers and imports
none of them. OSError belongs to Python and cannot say anything of itself: `reason_of` and `kind_of` speak for it. Everything else that is
raised is a bug and keeps its traceback.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class ErrorKind(enum.Enum):
    """What an error says to whoever asked."""

    INVALID = "invalid"  # the request itself is wrong, on every node and at any time
    NOT_FOUND = "not found"
    EXISTS = "exists"
    PRECONDITION = "precondition"  # the request is right, and this node or this snapshot cannot serve it as they are
    EXHAUSTED = "exhausted"  # a memory or a disk is full


class AgentError(Exception):
    """Base of everything that the agent raises with a name; the text says what happened and, where there is one, the remedy."""

    kind: ClassVar[ErrorKind] = ErrorKind.PRECONDITION
    reason: str = "internal"


REASON = "zerowake-reason"  # in the trailing metadata of a call that failed
FAILURES = (AgentError, OSError)  # for `except`: all that a caller is told of; the rest are bugs


def reason_of(error: AgentError | OSError) -> str:
    """The key of why a snapshot was not used."""
    if isinstance(error, AgentError):
        return error.reason
    return "timeout" if isinstance(error, TimeoutError) else "io-error"


def kind_of(error: AgentError | OSError) -> ErrorKind:
    """An OSError is, as a rule, a disk or a table of the kernel's that is full."""
    return error.kind if isinstance(error, AgentError) else ErrorKind.EXHAUSTED
