"""The filler as a process of its own, under a server that is this test: what it is ordered, it does, or says why not."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
from blake3 import blake3
from zerowake_proto import gpumem_pb2 as pb

from gpumem.hardware.host import HostMemory
from gpumem.wire.errors import Corrupt, GpumemError, Invalid, from_message
from gpumem.wire.frames import receive, send
from tests.worlds.gpumem_server import MIB, Weights

TARGET, SOURCE, FILES = 1, 2, 3
ARENA = 8 * MIB


class Ordered:
    """A filler that is running."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.process = process
        self.connection = connection
        self._numbers = itertools.count(1)

    def send(self, order: pb.Order, descriptors: Sequence[int] = ()) -> int:
        order.id = next(self._numbers)
        send(self.connection, order.SerializeToString(), descriptors)
        return order.id

    def order(self, order: pb.Order, descriptors: Sequence[int] = ()) -> None:
        """Raises GpumemError: what it reports."""
        number = self.send(order, descriptors)
        report = pb.Report.FromString(receive(self.connection).payload)
        assert report.id == number
        if report.HasField("error"):
            raise from_message(report.error)

    def open_range(self, number: int, pieces: list[int], writable: bool = True) -> list[int]:
        """Maps new memory there; its descriptors."""
        fds = [HostMemory().create(size) for size in pieces]
        self.order(pb.Order(open=pb.OpenRange(range=number, pieces=pieces, writable=writable)), fds)
        return fds

    def open_files(self, *weights: Weights) -> None:
        fds = [os.open(each.path, os.O_RDONLY) for each in weights]
        self.order(pb.Order(files=pb.OpenFiles(range=FILES)), fds)
        for fd in fds:
            os.close(fd)

    def move(self, *steps: pb.Step) -> None:
        self.order(pb.Order(move=pb.Move(steps=steps)))


@pytest.fixture
def filler() -> Iterator[Ordered]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(20)
    command = [sys.executable, "-m", "gpumem.filler.filler", "host", str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=(theirs.fileno(),), stderr=subprocess.PIPE) as process:
        theirs.close()
        try:
            yield Ordered(process, ours)
        finally:
            process.kill()


@pytest.fixture
def arena(filler: Ordered) -> Iterator[int]:
    """The filler's arena, which is mapped; its descriptor."""
    fd = HostMemory().create(ARENA)
    filler.order(pb.Order(arena=pb.Arena(size=ARENA)), [fd])
    yield fd
    os.close(fd)


def steps(weights: Weights) -> list[pb.Step]:
    """Each chunk from the file to where it belongs in the target."""
    layout = pb.Layout.FromString(weights.layout)
    offsets = itertools.accumulate((chunk.size for chunk in layout.chunks), initial=0)
    return [
        pb.Step(size=chunk.size, hash=chunk.hash, files=FILES, file_offset=weights.offset + at, target=TARGET, target_offset=at)
        for chunk, at in zip(layout.chunks, offsets, strict=False)
    ]


def test_chunks_of_a_file_come_to_lie_across_pieces(filler: Ordered, weights: Weights) -> None:
    pieces = [10 * MIB, 2 * MIB, 10 * MIB]
    fds = filler.open_range(TARGET, pieces)
    filler.open_files(weights)
    filler.move(*steps(weights))
    content = b"".join(os.pread(fd, size, 0) for fd, size in zip(fds, pieces, strict=True))
    assert content[: len(weights.data)] == weights.data
    assert not any(content[len(weights.data) :])


def test_by_way_of_the_arena_and_out_of_it(filler: Ordered, arena: int, weights: Weights) -> None:
    first = steps(weights)[0]
    filler.open_files(weights)
    loaded = pb.Step(size=first.size, hash=first.hash, files=FILES, file_offset=first.file_offset, arena_offset=weights.offset)
    filler.move(loaded)
    assert os.pread(arena, first.size, weights.offset) == weights.data[: first.size]
    (fd,) = filler.open_range(TARGET, [4 * MIB])
    filler.move(pb.Step(size=first.size, hash=first.hash, arena_offset=weights.offset, target=TARGET))
    assert os.pread(fd, first.size, 0) == weights.data[: first.size]


def test_from_another_range(filler: Ordered) -> None:
    (source,) = filler.open_range(SOURCE, [2 * MIB], writable=False)
    (target,) = filler.open_range(TARGET, [2 * MIB])
    os.pwrite(source, b"weights", 100)
    filler.move(pb.Step(size=7, source=SOURCE, source_offset=100, target=TARGET, target_offset=5))
    assert os.pread(target, 13, 0) == b"\0" * 5 + b"weights\0"


def test_what_is_not_the_chunk_is_told_and_the_next_order_is_done(filler: Ordered, weights: Weights) -> None:
    filler.open_range(TARGET, [22 * MIB])
    filler.open_files(weights)
    first, *rest = steps(weights)
    wrong = pb.Step.FromString(first.SerializeToString())
    wrong.hash = blake3(b"another").digest()
    with pytest.raises(Corrupt, match=f"bytes at {weights.offset} of source 0 are not chunk {wrong.hash.hex()[:12]}.*import it again"):
        filler.move(wrong, *rest)
    filler.move(first)


def test_a_step_that_fails_waits_for_the_others_of_its_move(filler: Ordered, weights: Weights) -> None:
    """After the report the server may use the memory for something else: nothing is written there any more."""
    (fd,) = filler.open_range(TARGET, [22 * MIB])
    filler.open_files(weights)
    wrong = pb.Step(size=1, hash=b"w" * 32, files=FILES, target=TARGET, target_offset=len(weights.data))  # done long before the others
    with pytest.raises(Corrupt):
        filler.move(wrong, *steps(weights) * 20)
    os.pwrite(fd, bytes(len(weights.data)), 0)
    filler.open_range(SOURCE, [4 * MIB])
    last = steps(weights)[0]
    last.target = SOURCE
    filler.move(last)  # steps are begun in order
    assert not any(os.pread(fd, len(weights.data), 0))


def test_what_is_closed_is_not_mapped_any_more(filler: Ordered) -> None:
    filler.open_range(TARGET, [2 * MIB])

    def mapped() -> bool:
        with open(f"/proc/{filler.process.pid}/maps") as maps:  # noqa: PTH123
            return "/memfd:gpumem" in maps.read()

    assert mapped()
    filler.order(pb.Order(close=pb.CloseRange(range=TARGET)))
    assert not mapped()
    filler.order(pb.Order(close=pb.CloseRange(range=TARGET)))  # twice does nothing


def test_orders_that_make_no_sense_are_refused(filler: Ordered) -> None:
    fd = HostMemory().create(2 * MIB)
    with pytest.raises(Invalid, match="2 pieces came with 1 descriptors"):
        filler.order(pb.Order(open=pb.OpenRange(range=TARGET, pieces=[2 * MIB] * 2)), [fd])
    with pytest.raises(Invalid, match="unknown kind"):
        filler.order(pb.Order())
    os.close(fd)


def test_it_ends_when_something_fails_that_it_does_not_know(filler: Ordered) -> None:
    """A GPU that failed once may fail at everything: another filler begins anew."""
    with pytest.raises(GpumemError, match="the filler of host failed"):
        filler.move(pb.Step(size=10, source=99, target=98))
    assert filler.process.wait(10) == 1


def test_it_ends_with_its_server(filler: Ordered) -> None:
    filler.open_range(TARGET, [2 * MIB])
    filler.connection.close()
    assert filler.process.wait(10) == 0


def test_an_interrupt_at_the_terminal_is_the_servers_to_handle(filler: Ordered) -> None:
    filler.open_range(TARGET, [2 * MIB])  # so that it has begun
    filler.process.send_signal(signal.SIGINT)
    filler.order(pb.Order(close=pb.CloseRange(range=TARGET)))
    assert filler.process.poll() is None
