"""Lent memory as an engine has it: mapped one piece behind the other at addresses that stay, of which `Client` is the owner."""

from __future__ import annotations

import threading
from typing import Protocol

from zerowake_proto import gpumem_pb2 as pb

from gpumem.hardware import host
from gpumem.hardware.memory import Mapped, Memory
from gpumem.wire.errors import Invalid, StaleLayout
from gpumem.wire.frames import Frame


class Holder(Protocol):
    """The client that has a range."""

    memory: Memory
    _lock: threading.RLock

    def _ask(self, request: pb.Request) -> tuple[pb.Reply, Frame]: ...
    def _attached(self, region: Region, wait: float) -> tuple[pb.Granted, Frame]: ...
    def _forget(self, found: Range, lease: int) -> None: ...


class Range:
    """Lent memory, mapped one piece behind the other at an address that stays."""

    def __init__(self, client: Holder, device: str) -> None:
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

    def __enter__(self) -> Range:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Region(Range):
    """Weights: read-only, once sealed."""

    def __init__(self, client: Holder, device: str, region_id: bytes, layout: bytes, capability: bytes) -> None:
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


class Scratch(Range):
    """Memory that is nobody else's, but for those who join it; zeros at first, and after every resume."""

    def __init__(self, client: Holder, device: str, shared_as: str = "") -> None:
        super().__init__(client, device)
        self.shared_as = shared_as


class Joined(Range):
    """Scratch of another process, which may be on another device: writable here, too."""

    def __init__(self, client: Holder, device: str, name: str) -> None:
        super().__init__(client, device)
        self.name = name
