"""Who is pid 1 of a container of its own, and who is not; what a process may do, in the words of the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from restore_agent.places.isolation import NotIsolated, check_isolated, rights_of
from tests.worlds.processes import below

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces")
OWN = ["unshare", "--pid", "--fork", "--mount", "--net", "--ipc", "--uts"]
WEAK = ["setpriv", "--bounding-set", "-all", "--no-new-privs", "--reuid", "1000", "--regid", "1000", "--groups", "2000"]
WAITS = [sys.executable, "-c", "import sys; print('there', flush=True); sys.stdin.read()"]


class Started:
    """Processes that wait until the test is over."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, *before: str) -> int:
        """The pid here of what these commands end up with."""
        process = subprocess.Popen([*before, *WAITS], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._processes.append(process)
        assert process.stdout
        assert process.stdout.readline() == b"there\n"
        return next((pid for _, pid, _ in below(process.pid)), process.pid)

    def end(self) -> None:
        for process in self._processes:
            process.communicate(timeout=20)


@pytest.fixture
def started() -> Iterator[Started]:
    started = Started()
    yield started
    started.end()


def test_a_container_of_its_own_without_rights_over_the_node(started: Started) -> None:
    check_isolated(started(*OWN, *WEAK))


@pytest.mark.parametrize(
    ("before", "why"),
    [
        (WEAK, "is not pid 1"),
        (["unshare", "--pid", "--fork", "--mount", "--ipc", *WEAK], "shares the node's net, uts namespace"),
        (OWN, "rights over the node"),
    ],
)
def test_what_is_not_isolated_is_refused_with_why(started: Started, before: list[str], why: str) -> None:
    with pytest.raises(NotIsolated, match=why):
        check_isolated(started(*before))


def test_one_that_has_ended() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(NotIsolated, match="has ended"):
        check_isolated(process.pid)


def test_rights_are_what_the_process_has(started: Started) -> None:
    weak, ours = rights_of(started(*WEAK)), rights_of(os.getpid())
    assert (weak.users, weak.groups, weak.capabilities, weak.confined) == ({1000}, {1000, 2000}, 0, True)
    assert weak.beyond(ours) == [], "with root's, one may be any user"
    assert [words.split()[0] for words in ours.beyond(weak)][:2] == ["capabilities", "users"]
