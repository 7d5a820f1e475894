"""The program: what it leaves of the machine as it was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.worlds.gpumem_server import MIB, served
from zerowake_shared.huge_pages import HugePages

SWITCH = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
BEFORE = "always within_size advise [never] deny force\n"


@pytest.fixture
def switch(tmp_path: Path) -> Path:
    """A file that programs see in the place of the machine's switch, started behind `in_its_place`."""
    made = tmp_path / "shmem_enabled"
    made.write_text(BEFORE)
    return made


def in_its_place(switch: Path) -> list[str]:
    return ["unshare", "--mount", "sh", "-c", f'mount --bind {switch} {SWITCH} && exec "$@"', "sh"]


pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not Path(SWITCH).exists(), reason="needs root, and a kernel with huge pages")


def test_a_server_puts_the_machines_switch_back_when_it_has_its_memory(tmp_path: Path, switch: Path) -> None:
    with served(tmp_path / "server", 4 * MIB, arena=2 * MIB, behind=in_its_place(switch)):
        assert switch.read_text() == "never"  # and no longer as it was written: it was held on in between


def test_a_server_puts_back_what_one_left_that_was_killed_as_it_made_memory(tmp_path: Path, switch: Path) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    child = os.fork()
    if not child:
        try:
            with HugePages(folder, switch, "advise", ("never",)).on():
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    assert switch.read_text() == "advise"
    with served(folder, 0, behind=in_its_place(switch)):
        assert switch.read_text() == "never"
