"""Where the bytes of snapshots come from and go to: one protocol for a folder, a bucket and another agent.

A source is asked for a range of an object by its key (layout.py). It answers by pieces, as they arrive, and promises nothing about what is
in them: whoever reads verifies (fetch.py). What it raises is one of few words, so that the reader knows whether another source may do
better, whether to come again, and what to tell a person. "Denied" is never said as "absent": a store whose key is wrong would look like one
that is empty, and a snapshot that is there would be taken again.

Rejected: a call that returns the whole object (nothing could be verified or resumed in the middle), and one that writes into the caller's
memory (a bucket's library and gRPC bring memory of their own, and would copy twice).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from restore_agent.errors import AgentError, ErrorKind

_WHOLE_SECONDS = 60.0
Piece: TypeAlias = "bytes | bytearray | memoryview"


class TransferError(AgentError):
    """A source or a destination could not do what it was asked for."""

    reason = "transfer-failed"


class Absent(TransferError):
    """The source was reached, it lets us read, and it has no such object."""

    kind = ErrorKind.NOT_FOUND
    reason = "absent"


class Denied(TransferError):
    """The source does not let us: no credentials, wrong or expired ones, no right to this bucket, or a clock that is wrong."""

    reason = "denied"


class Unreachable(TransferError):
    """The source could not be asked, did not answer in time, failed in itself, or broke off. Another try may find it better."""

    reason = "unreachable"


class Full(TransferError):
    """The destination has no room, or a quota is used up."""

    kind = ErrorKind.EXHAUSTED
    reason = "store-full"


class Altered(TransferError):
    """What came is not what was asked for: other bytes, fewer, or more."""

    reason = "corrupt"


@dataclass(frozen=True, slots=True)
class Stored:
    """An object of a store. `modified`: seconds since 1970, by the store's clock."""

    key: str
    size: int
    modified: float


class Source(Protocol):
    """Objects by key. Any number of tasks may read at once. `str()` of it is its name in messages: never a credential."""

    def read(self, key: str, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        """The bytes from `offset` on, at most `length` of them, in pieces of any size; fewer where the object ends before.

        A piece is the reader's until it asks for the next one. Ending the iteration ends the transfer.

        Raises:
            Absent, Denied, Unreachable: also in the middle.
        """

    async def size(self, key: str) -> int:
        """Of an object, bytes. Raises Absent, Denied, Unreachable."""


class Listed(Source, Protocol):
    """A source that says what it has. An agent does not: it is asked for what a snapshot names."""

    def objects(self, prefix: str) -> AsyncIterator[Stored]:
        """Every object whose key begins with the folders `prefix` (empty: all), in no order. Raises Denied, Unreachable."""


class Destination(Listed, Protocol):
    """A source that can be written to."""

    def unfinished(self) -> AsyncIterator[Stored]:
        """What writers have left that were ended, which `objects` does not have; `remove` takes it. Raises Denied, Unreachable."""

    async def put(self, key: str, data: Piece) -> None:
        """Makes the object, or replaces it, in one step: a reader sees all of it or what was there before.

        Raises:
            Denied, Unreachable, Full: nothing has changed, or all of it.
        """

    async def remove(self, key: str) -> None:
        """One that is not there is no error. Raises Denied, Unreachable."""


async def read_whole(source: Source, key: str, limit: int, seconds: float = _WHOLE_SECONDS) -> bytes:
    """A small object, whatever its source sends and however slowly.

    Raises:
        Absent, Denied, Unreachable: also where it has not come within so many seconds.
        Altered: it has more than `limit` bytes.
    """
    data = bytearray()
    try:
        async with asyncio.timeout(seconds), contextlib.aclosing(source.read(key, 0, limit + 1)) as pieces:
            async for piece in pieces:
                data += piece
                if len(data) > limit:
                    break
    except TimeoutError:
        raise Unreachable(f"{source} has sent {len(data)} bytes of {key} in {seconds:g} s, and not all: is its network cut?") from None
    if len(data) > limit:
        raise Altered(f"{key} of {source} has more than the {limit} bytes that one of its kind may have: somebody else wrote it")
    return bytes(data)
