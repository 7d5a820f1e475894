"""What the host's memory does beyond what tests/gpu/test_memory.py asks of every device's."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator

import pytest

from gpumem.hardware import host
from gpumem.hardware.host import HostMemory
from gpumem.hardware.memory import DeviceFull, MemoryFailed, StillWritable
from tests.worlds.gpumem_server import MIB
from tests.worlds.processes import descriptors


def test_memory_is_there_before_anybody_touches_it_and_keeps_its_size() -> None:
    fd = HostMemory().create(4 * MIB)
    assert os.fstat(fd).st_blocks * 512 == 4 * MIB
    for size in (2 * MIB, 6 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_huge_pages_are_held_on_while_memory_is_made_and_not_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    on: list[bool] = []
    seen: list[bool] = []

    @contextlib.contextmanager
    def huge_pages() -> Iterator[None]:
        on.append(True)
        yield
        on.pop()

    populate = host.populate
    monkeypatch.setattr(host, "populate", lambda *arguments: (seen.append(bool(on)), populate(*arguments)))
    os.close(HostMemory(huge_pages=huge_pages).create(2 * MIB))
    assert (seen, on) == ([True], [])


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_every_page_is_there_whoever_shares_the_work(threads: int) -> None:
    size = 10 * MIB
    fd = os.memfd_create("populated")
    os.ftruncate(fd, size)
    host.populate(fd, size, threads)
    assert os.fstat(fd).st_blocks * 512 == size
    os.close(fd)


def test_sealed_memory_is_written_by_nobody() -> None:
    memory = HostMemory()
    fd = memory.create(2 * MIB)
    with mmap.mmap(fd, 2 * MIB), pytest.raises(StillWritable):
        memory.seal(fd)
    memory.seal(fd)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 2 * MIB)
    mmap.mmap(fd, 2 * MIB, prot=mmap.PROT_READ).close()
    os.close(fd)


@pytest.mark.usefixtures("no_garbage")
def test_what_cannot_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors(os.getpid())
    with pytest.raises(DeviceFull, match="less than"):
        HostMemory().create(1 << 50)
    monkeypatch.setattr(HostMemory, "free", lambda _: (1 << 62, 1 << 62))
    with pytest.raises(MemoryFailed, match="mmap of"):
        HostMemory().create(1 << 62)
    assert len(descriptors(os.getpid())) == len(before)


def test_a_view_is_of_the_memory_itself() -> None:
    memory = HostMemory()
    fd = memory.create(2 * MIB)
    address = memory.reserve(2 * MIB)
    mapped = memory.map(address, fd, 2 * MIB, True)
    host.view(address + 5, 3)[:] = b"abc"
    assert os.pread(fd, 10, 0) == b"\0" * 5 + b"abc\0\0"
    mapped.close()
    memory.unreserve(address, 2 * MIB)
    os.close(fd)
