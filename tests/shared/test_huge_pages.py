"""The machine's switch for huge pages is as it was before, whoever held it on and however that ended. The switch here is a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.worlds.exhausted import descriptors_left
from zerowake_shared.huge_pages import HugePages

BEFORE = "always [madvise] never\n"
HOLD = """
import sys
from pathlib import Path
from zerowake_shared.huge_pages import HugePages
with HugePages(Path(sys.argv[1]), Path(sys.argv[2]), "always", ("madvise", "never")).on():
    print("on", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def switch(tmp_path: Path) -> Path:
    made = tmp_path / "enabled"
    made.write_text(BEFORE)
    return made


def opened(switch: Path, folder: Path | None = None) -> HugePages:
    return HugePages(folder or switch.parent, switch, "always", ("madvise", "never"))


@contextmanager
def another(switch: Path, folder: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds it on, until it reads a line or is killed."""
    command = [sys.executable, "-c", HOLD, str(folder or switch.parent), str(switch)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "on\n"
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> None:
    process.communicate("\n")
    assert process.returncode == 0


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def test_it_is_on_until_the_last_call_has_ended(switch: Path) -> None:
    huge = opened(switch)
    with huge.on():
        assert switch.read_text() == "always"
        with huge.on():
            pass
        assert switch.read_text() == "always"
    assert switch.read_text() == "madvise"
    with pytest.raises(ZeroDivisionError), huge.on():
        _ = 1 / 0
    assert switch.read_text() == "madvise"


def test_what_there_was_too_little_of_for_a_moment_costs_that_moment_alone(switch: Path) -> None:
    huge = opened(switch)
    with descriptors_left(0), huge.on():
        pass
    assert switch.read_text() == BEFORE
    with huge.on():
        assert switch.read_text() == "always"
        stack = ExitStack()
        stack.enter_context(descriptors_left(0))
    stack.close()  # it could not be put back
    assert switch.read_text() == "always"
    with huge.on():
        pass
    assert switch.read_text() == "madvise"


def test_a_better_setting_is_left_alone(switch: Path) -> None:
    switch.write_text("[always] madvise never\n")
    with opened(switch).on():
        assert switch.read_text() == "[always] madvise never\n"
    assert switch.read_text() == "[always] madvise never\n"


def test_what_somebody_else_sets_meanwhile_stays(switch: Path) -> None:
    with opened(switch).on():
        switch.write_text("never")
    assert switch.read_text() == "never"
    with opened(switch).on():
        assert switch.read_text() == "always"
    assert switch.read_text() == "never"


def test_after_a_kill_the_next_start_puts_it_back(switch: Path) -> None:
    with another(switch) as killed:
        kill(killed)
        assert switch.read_text() == "always"
        opened(switch)
        assert switch.read_text() == "madvise"
    opened(switch)
    assert switch.read_text() == "madvise"


@pytest.mark.parametrize("first", [end, kill])
def test_of_two_processes_the_last_puts_it_back(switch: Path, first: object) -> None:
    with another(switch) as one, another(switch) as other:
        assert callable(first)
        first(one)
        assert switch.read_text() == "always"
        with opened(switch).on():  # a third that starts and ends meanwhile
            pass
        assert switch.read_text() == "always"
        end(other)
        assert switch.read_text() == "madvise"


def test_both_killed(switch: Path) -> None:
    with another(switch) as one, another(switch) as other:
        kill(one)
        kill(other)
        assert switch.read_text() == "always"
        opened(switch)
        assert switch.read_text() == "madvise"


def test_processes_of_different_folders_end_it_right(switch: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    with another(switch, folders[0]) as one, another(switch, folders[1]) as other:
        kill(one)
        end(other)
        assert switch.read_text() == "always"  # the second changed nothing, so it puts nothing back
        opened(switch, folders[0])
        assert switch.read_text() == "madvise"


def test_a_child_that_is_just_being_started_does_not_keep_it_on(switch: Path) -> None:
    """It has the lock's descriptor, until it runs its own program."""
    with ExitStack() as stack:
        huge = opened(switch)
        holding = stack.enter_context(ExitStack())
        holding.enter_context(huge.on())
        pid = os.fork()
        if not pid:
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        stack.callback(os.waitpid, pid, 0)
        stack.callback(os.kill, pid, signal.SIGKILL)
        os.waitpid(pid, os.WUNTRACED)
        with another(switch) as other:
            holding.close()
            assert switch.read_text() == "always"
            end(other)
            assert switch.read_text() == "madvise"


def test_a_kernel_without_the_switch(tmp_path: Path) -> None:
    with opened(tmp_path / "missing").on():
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(switch: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is changed that could not be put back after a kill."""
    with opened(switch, switch.parent / "missing").on():
        assert switch.read_text() == BEFORE
    assert "small pages" in caplog.text
