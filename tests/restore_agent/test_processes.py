"""What /proc says of processes: their names inside, their memory, their time, whether they stand still."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from restore_agent.places.processes import cpu_seconds, descendant, descendants, has_ended, is_stopped, pid_inside, resident_bytes, status
from tests.worlds.waiting import PATIENCE, blocking_until

# Its name has what the fields of `stat` are parted by; its child waits as long as it does.
PARENT = """
import os, sys, threading
if os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("there", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[int]:
    program = tmp_path / "a ) b"
    program.symlink_to(sys.executable)
    process = subprocess.Popen([program, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"there\n"
    yield process.pid
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=PATIENCE)


def gone() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_process_and_all_below_it(parent: int) -> None:
    found = descendants(parent)
    assert len(found) == 2
    assert found[parent] == parent, "in no pid namespace of its own, it knows itself as everybody does"
    assert descendants(os.getpid()).items() >= found.items()
    assert descendants(gone()) == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a pid namespace")
def test_a_process_in_a_pid_namespace_has_its_own_name_for_itself() -> None:
    process = subprocess.Popen(
        ["unshare", "--pid", "--fork", "sh", "-c", "echo there; read _"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.readline()
    found = descendants(process.pid)
    assert found.keys() == {1, process.pid}
    assert pid_inside(status(found[1])) == 1
    assert {pid: descendant(process.pid, pid) for pid in (1, process.pid, 2)} == {**found, 2: None}
    process.communicate(timeout=PATIENCE)


def test_resident_memory_is_bytes() -> None:
    # Memory of its own: what the heap gives may have been used before, and be resident.
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        before = resident_bytes(os.getpid())
        for at in range(0, len(held), mmap.PAGESIZE):
            held[at] = 1
        assert 60 << 20 < resident_bytes(os.getpid()) - before < 80 << 20
    with pytest.raises(OSError, match="No such file"):
        resident_bytes(gone())


def test_a_zombie_has_no_memory() -> None:
    process = subprocess.Popen(["true"])
    blocking_until(lambda: "Z" in status(process.pid)["State"])
    assert resident_bytes(process.pid) == 0
    process.wait()


def test_time_that_was_used_and_no_more_when_nothing_works(parent: int) -> None:
    assert cpu_seconds([parent]) < 5.0
    begin, used = time.process_time(), cpu_seconds([os.getpid()])
    while time.process_time() - begin < 0.3:
        pass
    assert 0.2 < cpu_seconds([os.getpid()]) - used < 1.0
    assert cpu_seconds([gone()]) == 0.0


def test_every_task_stands_still_or_not(parent: int) -> None:
    assert not is_stopped(parent)
    os.kill(parent, signal.SIGSTOP)
    blocking_until(lambda: is_stopped(parent))
    os.kill(parent, signal.SIGCONT)
    blocking_until(lambda: not is_stopped(parent))
    assert not is_stopped(gone())


def test_who_is_dead_has_ended_whether_it_was_reaped_or_not(parent: int) -> None:
    assert not has_ended(parent)
    os.kill(parent, signal.SIGSTOP)
    blocking_until(lambda: is_stopped(parent))
    assert not has_ended(parent), "who stands still is there"
    process = subprocess.Popen(["true"])
    blocking_until(lambda: has_ended(process.pid))
    assert process.returncode is None, "nobody has reaped it"
    process.wait()
    assert has_ended(gone())
