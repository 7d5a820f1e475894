"""How an exit is told."""

import subprocess

import pytest

from restore_agent.places.place import describe_exit


@pytest.mark.parametrize(
    ("program", "told"), [("exit 0", "exit code 0"), ("exit 7", "exit code 7"), ("kill -SEGV $$", "killed by SIGSEGV")]
)
def test_a_wait_status_in_words(program: str, told: str) -> None:
    code = subprocess.run(["/bin/sh", "-c", program], check=False).returncode
    assert describe_exit(-code if code < 0 else code << 8) == told
