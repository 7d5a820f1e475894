"""Regions: weights on a device, named by content and layout, written once and then read by any number of processes."""

from __future__ import annotations

import enum
import itertools
import secrets
import time
from dataclasses import dataclass, field

from blake3 import blake3
from google.protobuf.message import DecodeError
from zerowake_proto import gpumem_pb2 as pb

from gpumem.server.pool import Slab
from gpumem.wire.errors import Invalid

LARGEST_CHUNK = 64 << 20  # bytes
ID = 32  # bytes of a BLAKE3


class State(enum.Enum):
    """How far a region has come. Only a sealed one is read by others."""

    FILLING = "filling"  # it has a writer, or a fill is under way
    PAUSED = "paused"  # a fill was interrupted; the next goes on
    SEALED = "sealed"


@dataclass(frozen=True)
class Chunks:
    """The chunks of a layout: what, how long, and where in the region."""

    hashes: tuple[bytes, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    size: int  # bytes of the region

    @staticmethod
    def parse(layout: bytes) -> Chunks:
        """Raises Invalid if it is no layout, or contradicts itself."""
        try:
            message = pb.Layout.FromString(layout)
        except DecodeError as error:
            raise Invalid(f"layout: not a serialized Layout ({error})") from None
        sizes = tuple(chunk.size for chunk in message.chunks)
        hashes = tuple(chunk.hash for chunk in message.chunks)
        if any(len(found) != ID for found in hashes):
            raise Invalid(f"layout.chunks: a hash is not {ID} bytes long, as one of BLAKE3 is")
        if any(not 0 < size <= LARGEST_CHUNK for size in sizes):
            raise Invalid(f"layout.chunks: a chunk is empty, or longer than {LARGEST_CHUNK} bytes: cut it")
        if not sum(sizes) <= message.size < 1 << 60 or not message.size:
            raise Invalid(f"layout.size: {message.size} bytes do not hold chunks of {sum(sizes)}")
        return Chunks(hashes, sizes, tuple(itertools.accumulate(sizes, initial=0))[:-1], message.size)


def identify(layout: bytes) -> bytes:
    """The id of the region that a serialized Layout describes."""
    return blake3(layout).digest()


@dataclass(eq=False)
class Region:
    """Weights on one device, in one namespace."""

    id: bytes
    namespace: str
    device: str
    layout: bytes
    chunks: Chunks
    slabs: list[Slab]
    private: bool
    pinned: bool
    written: bool = False  # by its client, and not filled by the server, which compares every chunk with its hash
    state: State = State.FILLING
    readers: int = 0
    used: float = field(default_factory=time.monotonic)  # when it was last lent, given back or sealed
    capability: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    filled: set[int] = field(default_factory=set)  # chunks that are there, by index

    @property
    def size(self) -> int:
        """Bytes of memory that it takes."""
        return sum(slab.size for slab in self.slabs)

    @property
    def filled_bytes(self) -> int:
        return self.chunks.size if self.state is State.SEALED else sum(self.chunks.sizes[index] for index in self.filled)

    def opens_to(self, namespace: str, capability: bytes) -> bool:
        """To everybody where it is public. What the server filled is what its id says, and so its whole namespace's, who need to know
        that alone. What a process wrote by itself could be anything: it is for those whom the process has told its capability."""
        own = namespace == self.namespace and not self.written
        return not self.private or own or secrets.compare_digest(self.capability, capability)

    def __str__(self) -> str:
        return f"region {self.id.hex()[:12]}"
