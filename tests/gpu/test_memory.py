"""What gpumem asks of a device's memory, asked of the host's and of a GPU's."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpumem.hardware.devices import devices, open_memory
from gpumem.hardware.memory import HOST, DeviceFull, Memory, MemoryFailed

PATTERN = bytes(range(256)) * 4096


@pytest.fixture(params=[HOST, pytest.param("gpu", marks=pytest.mark.gpu)])
def memory(request: pytest.FixtureRequest) -> Memory:
    return open_memory(HOST if request.param == HOST else devices()[0])


@contextmanager
def mapped(memory: Memory, fd: int, size: int, writable: bool) -> Iterator[int]:
    address = memory.reserve(size)
    piece = memory.map(address, fd, size, writable)
    try:
        yield address
    finally:
        piece.close()
        memory.unreserve(address, size)


def content(memory: Memory, address: int, size: int) -> bytes:
    if memory.addressable:
        return ctypes.string_at(address, size)
    from cuda.bindings import driver  # noqa: PLC0415  (only where there is a GPU)

    buffer = ctypes.create_string_buffer(size)
    memory.synchronize(0)
    _, context = driver.cuDevicePrimaryCtxRetain(0)
    driver.cuCtxSetCurrent(context)
    assert driver.cuMemcpyDtoH(ctypes.addressof(buffer), address, size)[0].name == "CUDA_SUCCESS"
    return buffer.raw


def test_new_memory_is_zeros_and_is_shared_by_descriptor(memory: Memory) -> None:
    size = 2 * memory.granularity
    fd = memory.create(size)
    source = ctypes.create_string_buffer(PATTERN, len(PATTERN))
    with mapped(memory, fd, size, True) as writer, mapped(memory, fd, size, False) as reader:
        assert content(memory, reader, size) == bytes(size)
        memory.copy_from_host(writer + size - len(PATTERN), ctypes.addressof(source), len(PATTERN), 0)
        memory.synchronize(0)
        assert content(memory, reader + size - len(PATTERN), len(PATTERN)) == PATTERN
        memory.copy(writer, writer + size - len(PATTERN), len(PATTERN), memory.streams - 1)
        memory.synchronize(memory.streams - 1)
        os.close(fd)
        assert content(memory, reader, len(PATTERN)) == PATTERN


def test_the_system_is_asked_what_is_mapped(memory: Memory) -> None:
    size = memory.granularity
    address = memory.reserve(2 * size)
    fd = memory.create(size)
    assert not memory.is_mapped(address)
    first = memory.map(address, fd, size, False)
    second = memory.map(address + size, fd, size, True)
    assert memory.is_mapped(address) and memory.is_mapped(address + size)
    first.close()
    first.close()
    assert not memory.is_mapped(address) and memory.is_mapped(address + size)
    second.close()
    assert not memory.is_mapped(address + size)
    again = memory.map(address, fd, size, False)
    assert memory.is_mapped(address)
    again.close()
    memory.unreserve(address, 2 * size)
    os.close(fd)


def test_what_is_no_memory_is_refused(memory: Memory) -> None:
    address = memory.reserve(memory.granularity)
    with Path(os.devnull).open("rb") as nothing, pytest.raises(MemoryFailed):
        memory.map(address, nothing.fileno(), memory.granularity, False)
    assert not memory.is_mapped(address)
    memory.unreserve(address, memory.granularity)
    free, total = memory.free()
    assert 0 < free <= total
    with pytest.raises(DeviceFull):
        memory.create(total // memory.granularity * memory.granularity + memory.granularity)


WRITE = """
import sys
from gpumem.hardware.devices import open_memory
import ctypes
memory = open_memory(sys.argv[1])
size, fd = memory.granularity, int(sys.argv[2])
address = memory.reserve(size)
memory.map(address, fd, size, False)
print("mapped", flush=True)
if memory.addressable:
    ctypes.memset(address, 1, 1)
else:
    source = ctypes.create_string_buffer(b"1" * 4096)
    memory.copy_from_host(address, ctypes.addressof(source), 4096, 0)
    memory.synchronize(0)
"""


def test_a_reader_that_writes_harms_itself_alone(memory: Memory) -> None:
    fd = memory.create(memory.granularity)
    with mapped(memory, fd, memory.granularity, False) as address:
        command = [sys.executable, "-c", WRITE, memory.identity, str(fd)]
        ended = subprocess.run(command, pass_fds=[fd], capture_output=True, text=True, timeout=60, check=False)
        assert ended.stdout == "mapped\n", ended.stderr
        assert ended.returncode == -signal.SIGSEGV if memory.addressable else "MemoryFailed" in ended.stderr
        assert content(memory, address, 4096) == bytes(4096)
    os.close(fd)


MAKE = """
import os, sys, time
from gpumem.hardware.devices import open_memory
import ctypes, socket
memory = open_memory(sys.argv[1])
size = memory.granularity
fd, address = memory.create(size), memory.reserve(size)
memory.map(address, fd, size, True)
source = ctypes.create_string_buffer(b"1" * 4096, 4096)
memory.copy_from_host(address, ctypes.addressof(source), 4096, 0)
memory.synchronize(0)
socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b"x"], [fd])
time.sleep(60)
"""


def test_memory_outlives_its_maker(memory: Memory) -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", MAKE, memory.identity, str(theirs.fileno())]
    with ours, theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as maker:
        ours.settimeout(60)
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        maker.kill()
    with mapped(memory, fd, memory.granularity, False) as address:
        assert content(memory, address, 4096) == b"1" * 4096
    os.close(fd)
