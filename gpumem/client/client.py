"""The client of an engine: maps lent memory at addresses that stay, and lets go of all of it before a snapshot.

    with Client() as client:
        region = client.attach(region_id)      mapped read-only at region.address
        cache = client.scratch(4 << 30)        mapped read-write, zeros, nobody else's
        client.quiesce()                       nothing of ours is mapped any more, no descriptor and no connection is open
        ...                                    the process is dumped, and restored, once or many times
        client.resume(wait=60)                 the same bytes at the same addresses (scratch: zeros again)

Its address ranges are reserved once and kept through all of this: pointers and CUDA graphs into them stay good. An imported GPU
allocation that is still mapped when a process is checkpointed loses that process, so quiesce asks the system whether each address is
free, and the server whether it still counts a lease, before it says yes.

The server may go away at any time; what is mapped stays valid without it. Then every call that needs it raises PeerGone, and
`resume` attaches again where a server is back. Calls are safe from any thread. In asyncio programs: `asyncio.to_thread`; to fill, evict
or look, `gpumem.client.control`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from zerowake_proto import gpumem_pb2 as pb

from gpumem.hardware import host
from gpumem.hardware.devices import open_memory
from gpumem.hardware.memory import Mapped, Memory
from gpumem.wire.blocking_connection import ANSWER_SECONDS, DEFAULT_SOCKET, BlockingConnection
from gpumem.wire.errors import Invalid, NotFound, PeerGone, StaleLayout, StillMapped, WrongDevice
from gpumem.wire.frames import Frame
from gpumem.wire.sources import Source, close_files, fill_request


class _Range:
    """Lent memory, mapped one piece behind the other at an address that stays."""

    def __init__(self, client: Client, device: str) -> None:
        self._client = client
        self.device = device
        self.address = 0
        self.mapped_size = 0  # bytes; what is asked for, rounded up
        self.writable = False
        self._lease = 0
        self._mapped: list[Mapped] = []

    def view(self) -> memoryview:
        """The bytes, where the processor can see them (the host's memory). To read them after quiesce kills the process."""
        if not self._client.memory.addressable:
            raise Invalid(f"memory of {self.device} is not the processor's to read: give its address to CUDA")
        if not self._mapped:
            raise Invalid(f"this memory of {self.device} is not mapped: resume() first")
        found = host.view(self.address, self.size)
        return found if self.writable else found.toreadonly()

    @property
    def size(self) -> int:
        return self.mapped_size

    def close(self) -> None:
        """Unmaps it, gives its addresses up and ends its lease. Twice does nothing."""
        with self._client._lock:
            if self.address:
                self._unmap()
                self._client.memory.unreserve(self.address, self.mapped_size)
                self.address = 0
                self._client._forget(self, self._lease)

    def _map(self, granted: pb.Granted, frame: Frame) -> None:
        """Maps what was granted, at the address it had. Takes the descriptors. Raises MemoryFailed, StaleLayout."""
        memory = self._client.memory
        self._lease, self.writable = granted.lease, granted.writable
        try:
            size = sum(granted.pieces)
            if len(frame.descriptors) != len(granted.pieces) or (self.address and size != self.mapped_size):
                raise StaleLayout(f"{size} bytes in {len(frame.descriptors)} pieces were lent, where {self.mapped_size} were before")
            if not self.address:
                self.address, self.mapped_size = memory.reserve(size), size
            address = self.address
            for piece, fd in zip(granted.pieces, frame.descriptors, strict=True):
                self._mapped.append(memory.map(address, fd, piece, granted.writable))
                address += piece
        except BaseException:
            self._unmap()
            raise
        finally:
            frame.close()

    def _unmap(self) -> None:
        for mapped in self._mapped:
            mapped.close()
        self._mapped = []

    def __enter__(self) -> _Range:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Region(_Range):
    """Weights: read-only, once sealed."""

    def __init__(self, client: Client, device: str, region_id: bytes, layout: bytes, capability: bytes) -> None:
        super().__init__(client, device)
        self.id = region_id
        self.serialized_layout = layout
        self.layout = pb.Layout.FromString(layout)
        self.capability = capability  # what others need to attach to a private region

    @property
    def size(self) -> int:
        return self.layout.size

    def seal(self) -> None:
        """Ends writing: from now on it is read-only, here too, at the same address, and others may attach.

        Raises:
            StillMapped: another mapping of it, in whichever process, could still write; end that and call this again.
        """
        with self._client._lock:
            if not self.writable:
                raise Invalid(f"region {self.id.hex()[:12]} is sealed already, and is read-only")
            self._unmap()
            written = self._lease
            self._client._ask(pb.Request(seal=pb.Seal(lease=written)))
            self._map(*self._client._attached(self, 0.0))
            self._client._ask(pb.Request(release=pb.Release(lease=written)))


class Scratch(_Range):
    """Memory that is nobody else's; zeros at first, and after every resume."""


_R = TypeVar("_R", Region, Scratch)


class Client:
    """An engine's share of lent memory: its connection, and what it has mapped over it."""

    def __init__(self, path: Path | str | None = None, *, device: str = "", label: str = "") -> None:
        """Connects.

        Args:
            path: the server's socket; GPUMEM_SOCKET if not given, or the usual place.
            device: a GPU's UUID or `host`; GPUMEM_DEVICE if not given; needed where the server holds memory of several.
            label: who is calling, for people that read the status.

        Raises:
            PeerGone, VersionMismatch, WrongDevice. MemoryFailed: this process does not see that device.
        """
        self._path = Path(path or os.environ.get("GPUMEM_SOCKET") or DEFAULT_SOCKET)
        self._label = label or Path("/proc/self/exe").readlink().name
        self._lock = threading.RLock()
        self._ranges: list[Region | Scratch] = []
        self._quiesced = False
        self._connection = BlockingConnection(self._path, self._label)
        self.device = self._choose(device or os.environ.get("GPUMEM_DEVICE", ""))
        try:
            # Now, since a GPU's takes 20 ms to load, in which an attach could map a hundred GiB.
            self.memory: Memory = open_memory(self.device)
        except BaseException:
            self._connection.close()
            raise

    def attach(self, region_id: bytes, capability: bytes = b"", wait: float = 0.0) -> Region:
        """Maps a sealed region read-only, waiting up to `wait` seconds for it to be there.

        Raises:
            NotFound, NotSealed, PeerGone, MemoryFailed.
        """
        with self._lock:
            region = Region(self, self.device, region_id, b"", capability)
            granted, frame = self._attached(region, wait)
            region.serialized_layout = granted.layout
            region.layout = pb.Layout.FromString(granted.layout)
            return self._map_granted(region, granted, frame)

    def begin(self, region_id: bytes, layout: pb.Layout | bytes, pinned: bool = False) -> Region:
        """A new region of this namespace's, mapped to be written; call its `seal` when that is done. Gone if this process ends before.

        Raises:
            Exists: attach to it. NotSealed: somebody writes it; attach with a wait. OutOfMemory, PeerGone, MemoryFailed.
        """
        serialized = layout if isinstance(layout, bytes) else layout.SerializeToString(deterministic=True)
        with self._lock:
            begin = pb.Begin(device=self.device, id=region_id, layout=serialized, pinned=pinned)
            reply, frame = self._ask(pb.Request(begin=begin))
            region = Region(self, self.device, region_id, serialized, reply.granted.capability)
            return self._map_granted(region, reply.granted, frame)

    def scratch(self, size: int) -> Scratch:
        """Exclusive memory of at least `size` bytes, zeros. Raises OutOfMemory, PeerGone, MemoryFailed."""
        with self._lock:
            reply, frame = self._ask(pb.Request(scratch=pb.Scratch(device=self.device, size=size)))
            return self._map_granted(Scratch(self, self.device), reply.granted, frame)

    def fill(
        self,
        layout: pb.Layout | bytes,
        sources: Sequence[Source],
        *,
        into_arena: bool = False,
        pinned: bool = False,
    ) -> pb.Filled:
        """Has the server fill and seal a region, and returns when it is done; then attach to `.id` with `.capability`.

        Args:
            sources: where the chunks are; those that the server has already need none.
            into_arena: bring the chunks into host memory only.

        Raises:
            Corrupt, OutOfMemory, NotFound, FillerLost, PeerGone.
        """
        request, files = fill_request(layout, sources, "" if into_arena else self.device, pinned)
        # A connection of its own: this may take long, and other threads attach meanwhile.
        connection = BlockingConnection(self._path, self._label)
        try:
            return connection.ask(request, files, seconds=None)[0].filled
        finally:
            connection.close()
            close_files(files)

    def quiesce(self) -> None:
        """Lets go of everything, keeping the addresses: unmaps, ends all leases, closes the connection. Twice does nothing.

        Raises:
            Invalid: a region is being written: seal or close it first. Nothing has changed then.
            StillMapped: something is mapped or leased still; do not checkpoint this process.
        """
        with self._lock:
            if self._quiesced:
                return
            if writing := [found for found in self._ranges if isinstance(found, Region) and found.writable]:
                raise Invalid(f"region {writing[0].id.hex()[:12]} is being written: seal or close it before quiesce")
            pieces = [(found, mapped.address) for found in self._ranges for mapped in found._mapped]
            for found in self._ranges:
                found._unmap()
            for found, address in pieces:
                if self.memory.is_mapped(address):
                    raise StillMapped(f"memory of {found.device} is still mapped at {address:#x}; do not checkpoint this process")
            if self._connection.open:
                try:
                    reply, _ = self._connection.ask(pb.Request(release=pb.Release()))
                except PeerGone:
                    pass  # a server that is gone holds no lease of ours
                else:
                    if reply.done.leases:
                        raise StillMapped(f"the server still counts {reply.done.leases} leases of this process; do not checkpoint it")
            self._connection.close()
            self._quiesced = True

    def resume(self, wait: float = 60.0, moved: Mapping[str, str] | None = None) -> None:
        """Connects again and maps everything where it was. Raises what `attach` and `scratch` do; then nothing is mapped, and it may be
        called again.

        Args:
            wait: seconds that each region may take to be filled.
            moved: UUIDs of GPUs that have others in their place since, such as a process restored elsewhere finds them. What was mapped
                of one is then taken from the other.
        """
        with self._lock:
            if self._connection.open and not self._quiesced:
                return
            self.quiesce()
            self._connection = BlockingConnection(self._path, self._label)
            before = self.device
            try:
                self._move((moved or {}).get(before, before))
                self._choose(self.device)
                for found in self._ranges:
                    if isinstance(found, Region):
                        granted, frame = self._attached(found, wait)
                        if granted.layout != found.serialized_layout:
                            frame.close()
                            raise StaleLayout(f"region {found.id.hex()[:12]} has another layout since: start this process anew")
                        found._map(granted, frame)
                # Last: where memory is short, it is regions without a lease that go for it.
                self._map_scratch([found for found in self._ranges if isinstance(found, Scratch)])
            except BaseException:
                for found in self._ranges:
                    found._unmap()
                self._connection.close()
                self._move(before)
                raise
            finally:
                self._quiesced = not self._connection.open

    def close(self) -> None:
        """Closes everything that is mapped, and the connection."""
        with self._lock:
            for found in list(self._ranges):
                found.close()
            self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _move(self, device: str) -> None:
        self.device = device
        self.memory.move(device)
        for found in self._ranges:
            found.device = device

    def _choose(self, device: str) -> str:
        there = [found.identity for found in self._connection.welcome.devices]
        if device in there:
            return device
        if device or len(there) != 1:
            self._connection.close()
            asked = f"no {device}" if device else "several devices, and none was named"
            raise WrongDevice(f"gpumem at {self._path} holds {asked}; there are {', '.join(there)}")
        return there[0]

    def _ask(self, request: pb.Request) -> tuple[pb.Reply, Frame]:
        return self._connection.ask(request)

    def _map_scratch(self, ranges: Sequence[Scratch]) -> None:
        """New memory for all of them by one request, since each takes a millisecond of a wake; by more where the server grants one at a
        time, as it did before."""
        while ranges:
            sizes = [found.mapped_size for found in ranges]
            reply, frame = self._ask(pb.Request(scratch=pb.Scratch(device=self.device, size=sizes[0], more=sizes[1:])))
            try:
                granted = [reply.granted, *reply.granted.more]
                for found, each in zip(ranges, granted, strict=False):
                    own = frame.descriptors[: len(each.pieces)]
                    del frame.descriptors[: len(each.pieces)]
                    found._map(each, Frame(b"", own))
            finally:
                frame.close()
            ranges = ranges[len(granted) :]

    def _attached(self, region: Region, wait: float) -> tuple[pb.Granted, Frame]:
        ref = pb.RegionRef(device=region.device, id=region.id, capability=region.capability)
        reply, frame = self._connection.ask(pb.Request(attach=pb.Attach(region=ref, wait_seconds=wait)), seconds=ANSWER_SECONDS + wait)
        return reply.granted, frame

    def _map_granted(self, found: _R, granted: pb.Granted, frame: Frame) -> _R:
        """Maps what was lent for the first time, and keeps it for `quiesce` and `resume`. What cannot be mapped is given back."""
        try:
            found._map(granted, frame)
        except BaseException:
            found.close()
            self._forget(found, granted.lease)  # close() did not, where it has no address yet
            raise
        self._ranges.append(found)
        return found

    def _forget(self, found: _Range, lease: int) -> None:
        """Drops a range and ends its lease, where there is still a server to tell."""
        self._ranges = [kept for kept in self._ranges if kept is not found]
        if self._connection.open:
            with contextlib.suppress(PeerGone, NotFound):
                self._connection.ask(pb.Request(release=pb.Release(lease=lease)))
