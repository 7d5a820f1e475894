"""The client of an engine: maps lent memory at addresses that stay, and lets go of all of it before a snapshot.

    with Client() as client:
        region = client.attach(region_id)      mapped read-only at region.address
        cache = client.scratch(4 << 30)        mapped read-write, zeros, nobody else's
        client.quiesce()                       nothing of ours is mapped any more, no descriptor and no connection is open
        ...                                    the process is dumped, and restored, once or many times
        client.resume(wait=60)                 the same bytes at the same addresses (scratch: zeros again)

Processes of one engine can share scratch, each device's with the others: `scratch(size, shared_as="a name")` in one, `join("a name",
device)` in the others. What they have in common beside the name is a `meeting`, bytes that they agree on, and agree on anew for each
resume: engines that were restored from one image know the same names, and must not meet.

Its address ranges are reserved once and kept through all of this: pointers and CUDA graphs into them stay good. An imported GPU
allocation that is still mapped when a process is checkpointed loses that process, so quiesce asks the system whether each address is
free, and the server whether it still counts a lease, before it says yes.

The server may go away at any time; what is mapped stays valid without it. Then every call that needs it raises PeerGone, and
`resume` attaches again where a server is back. Calls are safe from any thread. In asyncio programs: `asyncio.to_thread`; to fill, evict
or look, `gpumem.client.control`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from zerowake_proto import gpumem_pb2 as pb

from gpumem.client.ranges import Joined, Range, Region, Scratch
from gpumem.hardware.devices import open_memory
from gpumem.hardware.memory import Memory
from gpumem.wire.blocking_connection import ANSWER_SECONDS, DEFAULT_SOCKET, BlockingConnection
from gpumem.wire.errors import Invalid, NotFound, NotSealed, PeerGone, StaleLayout, StillMapped, WrongDevice
from gpumem.wire.frames import Frame
from gpumem.wire.sources import Source, close_files, fill_request

_R = TypeVar("_R", Region, Scratch, Joined)


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
        self._ranges: list[Region | Scratch | Joined] = []
        self._meeting = b""
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

    def meet(self, meeting: bytes) -> None:
        """From now on names of shared memory are of this meeting: random bytes that all who share it were told."""
        self._meeting = meeting

    def scratch(self, size: int, shared_as: str = "") -> Scratch:
        """Exclusive memory of at least `size` bytes, zeros. Raises OutOfMemory, PeerGone, MemoryFailed.

        shared_as: the name by which others of the same meeting join it; empty: nobody does.
        """
        with self._lock:
            found = Scratch(self, self.device, shared_as)
            reply, frame = self._ask(
                pb.Request(scratch=pb.Scratch(device=self.device, size=size, secrets=_said([self._secret(shared_as)])))
            )
            return self._map_granted(found, reply.granted, frame)

    def join(self, name: str, device: str, wait: float = 60.0) -> Joined:
        """Maps the scratch that another process of the same meeting shares by that name, waiting up to `wait` seconds for it.

        Raises:
            NotFound: it was not there in time. MemoryFailed: this process cannot reach memory of that device.
            PeerGone.
        """
        with self._lock:
            found = Joined(self, device, name)
            granted, frame = self._joined(found, wait)
            return self._map_granted(found, granted, frame)

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

    def resume(self, wait: float = 60.0, moved: Mapping[str, str] | None = None, meeting: bytes = b"") -> None:
        """Connects again and maps everything where it was. Raises what `attach` and `scratch` do; then nothing is mapped, and it may be
        called again.

        Args:
            wait: seconds that each region may take to be filled.
            moved: UUIDs of GPUs that have others in their place since, such as a process restored elsewhere finds them. What was mapped
                of one is then taken from the other.
            meeting: another one for what is shared with other processes, whose resumes run at the same time with the same; wanted
                wherever anything is.
        """
        with self._lock:
            if self._connection.open and not self._quiesced:
                return
            self.quiesce()
            shared = [found for found in self._ranges if isinstance(found, Joined) or (isinstance(found, Scratch) and found.shared_as)]
            if shared and (not meeting or meeting == self._meeting):
                raise Invalid("memory is shared with other processes: resume them together, with a new meeting that all are told")
            self._meeting = meeting
            self._connection = BlockingConnection(self._path, self._label)
            before = {id(found): found.device for found in self._ranges}, self.device
            try:
                self._move(moved or {})
                self._choose(self.device)
                on_their_way = []
                for found in self._ranges:
                    if isinstance(found, Region):
                        try:
                            self._map_again(found, 0.0)
                        except (NotFound, NotSealed):
                            on_their_way.append(found)
                # After those that are there: where memory is short, it is regions without a lease that go for it. One that is being
                # filled is no such, and what it takes until it is there is time for this.
                self._map_scratch([found for found in self._ranges if isinstance(found, Scratch)])
                for found in on_their_way:
                    self._map_again(found, wait)
                # Each has its own by now or soon, so that none waits for one who waits for it.
                for found in self._ranges:
                    if isinstance(found, Joined):
                        found._map(*self._joined(found, wait))
            except BaseException:
                for found in self._ranges:
                    found._unmap()
                    found.device = before[0][id(found)]
                self._connection.close()
                self.device = before[1]
                self.memory.move(self.device)
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

    def _move(self, moved: Mapping[str, str]) -> None:
        self.device = moved.get(self.device, self.device)
        self.memory.move(self.device)
        for found in self._ranges:
            found.device = moved.get(found.device, found.device)

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
            sizes, secrets = [found.mapped_size for found in ranges], [self._secret(found.shared_as) for found in ranges]
            wanted = pb.Scratch(device=self.device, size=sizes[0], more=sizes[1:], secrets=_said(secrets))
            reply, frame = self._ask(pb.Request(scratch=wanted))
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

    def _map_again(self, region: Region, wait: float) -> None:
        """Where it was. Raises what `attach` does, and StaleLayout."""
        granted, frame = self._attached(region, wait)
        if granted.layout != region.serialized_layout:
            frame.close()
            raise StaleLayout(f"region {region.id.hex()[:12]} has another layout since: start this process anew")
        region._map(granted, frame)

    def _joined(self, found: Joined, wait: float) -> tuple[pb.Granted, Frame]:
        join = pb.Join(device=found.device, secret=self._secret(found.name), wait_seconds=wait)
        reply, frame = self._connection.ask(pb.Request(join=join), seconds=ANSWER_SECONDS + wait)
        return reply.granted, frame

    def _secret(self, name: str) -> bytes:
        """Of shared memory of that name, in this meeting."""
        if name and not self._meeting:
            raise Invalid(f"memory is to be shared as {name!r} before there is a meeting: call meet() with bytes that the others are told")
        return hashlib.blake2b(name.encode(), key=self._meeting[:64], digest_size=32).digest() if name else b""

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

    def _forget(self, found: Range, lease: int) -> None:
        """Drops a range and ends its lease, where there is still a server to tell."""
        self._ranges = [kept for kept in self._ranges if kept is not found]
        if self._connection.open:
            with contextlib.suppress(PeerGone, NotFound):
                self._connection.ask(pb.Request(release=pb.Release(lease=lease)))


def _said(secrets: list[bytes]) -> list[bytes]:
    """Nothing where there is none."""
    return secrets if any(secrets) else []
