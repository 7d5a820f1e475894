"""The filler: the child of the server that moves bytes on one device. `python -m gpumem.filler.filler DEVICE SOCKET`, by the foreman.

It carries out orders, and knows nothing of regions or leases. Orders come over its one socket; when that closes, it ends. A move is many
steps at once, on a fixed number of threads: reading, hashing and copying all let go of Python's lock.

A file is read from the page cache where it is there, and around it (O_DIRECT) where it is not: weights that are read once would only
drive others out. The server lays a chunk into the arena so that disk block and memory block begin at the same byte.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor, wait

from blake3 import blake3
from zerowake_proto import gpumem_pb2 as pb

from gpumem.filler.files import BLOCK, File
from gpumem.hardware import host
from gpumem.hardware.devices import open_memory
from gpumem.hardware.memory import DeviceFull, Mapped, Memory
from gpumem.wire.errors import Corrupt, FillerLost, GpumemError, Invalid, OutOfMemory, to_message
from gpumem.wire.frames import Frame, ProtocolViolation, receive, send

_ORDERS = 4  # moves at once
_STEPS = 16  # on any number of processors: most wait, and a disk wants many requests at once
_STREAM = 0  # one for all copies: a move then waits for its own and those before them, never for the next move's


class Range:
    """Pieces of memory, mapped one behind the other."""

    def __init__(self, memory: Memory, pieces: list[int], descriptors: list[int], writable: bool) -> None:
        if len(pieces) != len(descriptors):
            raise Invalid(f"an order to map {len(pieces)} pieces came with {len(descriptors)} descriptors")
        self._memory = memory
        self.size = sum(pieces)
        self.address = memory.reserve(self.size)
        self._mapped: list[Mapped] = []
        try:
            for offset, size, fd in zip(itertools.accumulate(pieces, initial=0), pieces, descriptors, strict=False):
                self._mapped.append(memory.map(self.address + offset, fd, size, writable))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for mapped in self._mapped:
            mapped.close()
        self._memory.unreserve(self.address, self.size)


class Filler:
    """What runs in the child: carries out orders, several at once. The server sees it as a FillerProcess."""

    def __init__(self, memory: Memory, connection: socket.socket) -> None:
        self._memory = memory
        self._connection = connection
        self._sending = threading.Lock()
        self._orders = ThreadPoolExecutor(_ORDERS, "orders")
        self._steps = ThreadPoolExecutor(_STEPS, "steps")
        self._ranges: dict[int, Range] = {}
        self._files: dict[int, list[File]] = {}
        self._arena = 0  # its address

    def run(self) -> None:
        """Takes orders until the server is gone."""
        while True:
            try:
                frame = receive(self._connection)
            except (EOFError, OSError, ProtocolViolation):
                return
            order = pb.Order.FromString(frame.payload)
            if order.HasField("move"):
                self._orders.submit(self._report, order, frame)
            else:
                self._report(order, frame)

    def _report(self, order: pb.Order, frame: Frame) -> None:
        report = pb.Report(id=order.id)
        try:
            self._obey(order, frame)
            report.done.SetInParent()
        except GpumemError as error:
            report.error.CopyFrom(to_message(error))
        except DeviceFull as error:
            report.error.CopyFrom(to_message(OutOfMemory(f"{self._memory.identity}: {error}; hold less (gpumem reserve)")))
        except Exception as error:
            # A device that failed once may fail at everything from now on: the next filler begins anew.
            traceback.print_exc()
            report.error.CopyFrom(to_message(FillerLost(f"the filler of {self._memory.identity} failed: {error}")))
        frame.close()
        with self._sending, contextlib.suppress(OSError):
            send(self._connection, report.SerializeToString())
        if report.error.reason == pb.Error.FILLER_LOST:
            os._exit(1)

    def _obey(self, order: pb.Order, frame: Frame) -> None:
        match order.WhichOneof("order"):
            case "arena":
                if order.arena.size:
                    self._arena = host.map_arena(frame.descriptors[0], order.arena.size)
                    self._memory.pin(self._arena, order.arena.size)
            case "open":
                self._ranges[order.open.range] = Range(self._memory, list(order.open.pieces), frame.descriptors, order.open.writable)
            case "files":
                self._files[order.files.range] = [File.of(fd) for fd in frame.descriptors]
                frame.descriptors.clear()
            case "close":
                if found := self._ranges.pop(order.close.range, None):
                    found.close()
                for file in self._files.pop(order.close.range, []):
                    file.close()
            case "move":
                self._move(order.move)
            case unknown:
                raise Invalid(f"an order of unknown kind {unknown}")

    def _move(self, move: pb.Move) -> None:
        done = [self._steps.submit(self._step, step) for step in move.steps]
        wait(done)  # all of them, also after a failure: the server may then use the memory for something else
        self._memory.synchronize(_STREAM)
        for step in done:
            step.result()

    def _step(self, step: pb.Step) -> None:
        target = self._ranges[step.target].address + step.target_offset if step.HasField("target") else 0
        if step.HasField("source"):
            self._memory.copy(target, self._ranges[step.source].address + step.source_offset, step.size, _STREAM)
            return
        by_arena = step.HasField("arena_offset")
        place = self._arena + step.arena_offset if by_arena else target
        if step.HasField("files"):
            self._load(step, place, by_arena)
        if by_arena and target:
            self._memory.copy_from_host(target, place, step.size, _STREAM)

    def _load(self, step: pb.Step, address: int, by_arena: bool) -> None:
        bytes_ = host.view(address, step.size)
        aligned = None
        lead = step.file_offset % BLOCK
        if by_arena and address % BLOCK == lead:
            aligned = host.view(address - lead, -(-(lead + step.size) // BLOCK) * BLOCK)
        self._files[step.files][step.file].read(step.file_offset, bytes_, aligned)
        if blake3(bytes_).digest() != step.hash:
            raise Corrupt(
                f"the {step.size} bytes at {step.file_offset} of source {step.file} are not chunk {step.hash.hex()[:12]}: "
                "the file has changed since it was imported; import it again, or bring the right one"
            )


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server's to handle; it closes the socket
    identity, descriptor = sys.argv[1:]
    status = 0
    try:
        Filler(open_memory(identity), socket.socket(fileno=int(descriptor))).run()
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)  # at once: a thread may hang in a read that will never come back


if __name__ == "__main__":
    main()
