"""What a process lacks is said with what to do, and nothing else is taken for it."""

import errno
import os
import threading

import pytest

from tests.worlds.exhausted import descriptors_left, no_threads
from zerowake_shared.lack import lack, startable_threads


def test_descriptors() -> None:
    with descriptors_left(0), pytest.raises(OSError) as raised:
        os.open("/", os.O_RDONLY)
    assert lack(raised.value, "gpumem") == (
        "gpumem has no descriptor left: raise its limit of open files (systemd: LimitNOFILE), or ask again later"
    )


def test_threads() -> None:
    with no_threads(), pytest.raises(RuntimeError) as raised:
        threading.Thread(target=print).start()
    assert "can start no more threads: raise its limit of processes" in lack(raised.value, "the agent")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "the agent may have no more memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the agent may have no more memory"),
        (OSError(errno.ENFILE, "Too many open files in system"), "this machine has no descriptor left"),
    ],
)
def test_memory_and_the_machine(error: Exception, said: str) -> None:
    assert lack(error, "the agent").startswith(said)


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "No such file"), RuntimeError("no running event loop"), ValueError("x")])
def test_anything_else(error: Exception) -> None:
    assert lack(error, "the agent") == ""


def test_threads_are_counted_and_have_ended() -> None:
    before = threading.active_count()
    assert startable_threads(20) == 20
    assert threading.active_count() == before
    with no_threads():
        assert startable_threads(20) == 0
