"""How an exit is told."""

import errno
import subprocess

import pytest

from restore_agent.places.place import cannot_start, describe_exit


@pytest.mark.parametrize(
    ("program", "told"), [("exit 0", "exit code 0"), ("exit 7", "exit code 7"), ("kill -SEGV $$", "killed by SIGSEGV")]
)
def test_a_wait_status_in_words(program: str, told: str) -> None:
    code = subprocess.run(["/bin/sh", "-c", program], check=False).returncode
    assert describe_exit(-code if code < 0 else code << 8) == told


def test_what_is_not_there_is_told_from_what_the_machine_lacks() -> None:
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory")
    assert cannot_start("sandbox-init", missing).endswith("No such file or directory; reinstall zerowake")
    for number in (errno.EAGAIN, errno.EMFILE):
        said = cannot_start("sandbox-init", OSError(number, "none left"))
        assert "none left; the agent needs more processes, open files or memory" in said
        assert "reinstall" not in said
