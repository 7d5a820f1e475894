"""One owner of a state folder, whoever was killed before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zerowake_shared.state_folder import STORE_LOCK, FolderInUse, Lock, UnusableFolder, owned, store_holder, used

HOLD = """
import sys
from pathlib import Path
from zerowake_shared.state_folder import owned, used
with {kind}(Path(sys.argv[1])) as parents:
    print("held", parents, flush=True)
    sys.stdin.read()
"""


class Other:
    """Another process that has the folder, as an owner or as an agent that was started by hand."""

    def __init__(self, folder: Path, kind: str) -> None:
        command = [sys.executable, "-c", HOLD.format(kind=kind), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        assert self.process.stdout.readline().startswith("held")

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_second_owner_is_told_who_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "state"
    with Other(folder, "owned") as first:
        for kind in (owned, used):
            message = rf"the state folder {folder} is in use by pid {first.process.pid} \(python.*\); stop that, or use another folder"
            with pytest.raises(FolderInUse, match=message), kind(folder):
                pass
    assert oct(folder.stat().st_mode)[-3:] == "700"


@pytest.mark.parametrize("kind", ["owned", "used"])
def test_nothing_is_left_by_one_that_was_killed(tmp_path: Path, kind: str) -> None:
    with Other(tmp_path, kind) as first:
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        with owned(tmp_path):
            pass


def test_an_agent_by_hand_keeps_an_owner_away(tmp_path: Path) -> None:
    lock = Lock.take(tmp_path / STORE_LOCK)  # as its store does
    with used(tmp_path) as parents:
        assert not parents
        with pytest.raises(FolderInUse, match=f"in use by pid {os.getpid()} "), owned(tmp_path):
            pass
        with used(tmp_path):
            pass  # the store's lock tells agents apart
    lock.close()
    with owned(tmp_path):
        pass


def test_an_owners_child_lives_in_its_folder(tmp_path: Path) -> None:
    with owned(tmp_path), Other(tmp_path, "used"):
        pass


def test_who_has_the_store(tmp_path: Path) -> None:
    assert store_holder(tmp_path) == ""
    lock = Lock.take(tmp_path / STORE_LOCK)
    assert store_holder(tmp_path).startswith(f"pid {os.getpid()} (")
    with pytest.raises(BlockingIOError):
        Lock.take(tmp_path / STORE_LOCK)
    lock.close()
    assert store_holder(tmp_path) == "", "the name of the last holder is in it still"


def test_where_nothing_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, why in (
        (tmp_path / "file", "is no folder"),
        (tmp_path / "file" / "state", "is no folder"),
        (Path("/proc/x"), "make it writable"),
    ):
        for kind in (owned, used):
            with pytest.raises(UnusableFolder, match=f"the state folder {folder} cannot be used: .*{why}"), kind(folder):
                pass
