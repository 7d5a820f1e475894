"""Containers as careful owners write them: few rights, another user, a read-only root."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from restore_agent.drivers.criu import CriuError
from restore_agent.places.container import Container
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.node import Node
from restore_agent.sequences.phases import Phases
from tests.worlds.agent import PORT
from tests.worlds.captured import ADDRESS, IMAGE, answer_of, nothing, request, rights
from tests.worlds.containers import Callers, container
from tests.worlds.image import MAPPED, PYTHON, SERVER

pytestmark = pytest.mark.usefixtures("needs_criu", "needs_runc")
CAP_SYS_RESOURCE = 1 << 24


# A thread of its own, and then a filter that allows everything for the first thread alone.
HALF_FILTERED = f"""
import ctypes, runpy, struct, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
allow = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7fff0000))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 1, ctypes.addressof(allow)))
if ctypes.CDLL(None).prctl(22, 2, program, 0, 0):
    sys.exit("no filter")
sys.argv = ["server", "{PORT}", "1", "{MAPPED}"]
runpy.run_path("{SERVER}", run_name="__main__")
"""


async def test_one_thread_that_no_filter_is_on_is_enough(node: Node, callers: Callers, tmp_path: Path) -> None:
    """It is told from threads whose filter the image keeps at their process's first one."""
    plain = dataclasses.replace(request([str(PYTHON), "-c", HALF_FILTERED]), name="half")
    async with container(tmp_path / "two", callers.folder, filtered=False):
        place = Container(await callers.next(), IMAGE, [ADDRESS])
        captured = await node.capture(plain, nothing, Phases(), place.open)
        await place.close()
    async with container(tmp_path / "three", callers.folder):
        with pytest.raises(RestoreFailed, match="no seccomp filter"):
            await node.restore_into(Container(await callers.next(), IMAGE, [ADDRESS]), "half", captured.snapshot, Phases())


RESTRICTED = {"user": 1000, "groups": [2000], "capabilities": [], "read_only": True, "empty_dirs": ["/tmp"]}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"capabilities": []}, id="root without capabilities"),
        pytest.param({"capabilities": ["CAP_NET_BIND_SERVICE"]}, id="root that may listen on any port"),
        pytest.param({"user": 1000, "capabilities": []}, id="runAsUser"),
        pytest.param({"user": 1000}, id="runAsUser with the runtime's capabilities"),
        pytest.param({"groups": [2000, 3000], "capabilities": []}, id="fsGroup"),
        pytest.param(RESTRICTED, id="restricted"),
    ],
)
async def test_engines_with_few_rights(node: Node, callers: Callers, tmp_path: Path, options: dict[str, Any]) -> None:
    """Taken in one container and restored into the next as its user, with none of the agent's rights."""
    if options.get("user") and not has_resource_capability():
        pytest.skip("CRIU needs CAP_SYS_RESOURCE to read the limits of another user's process, and this machine's root has none")
    volatile = options.get("empty_dirs", [])
    words = [str(PYTHON), str(SERVER), str(PORT), "8", str(MAPPED), "--child"]
    async with container(tmp_path / "two", callers.folder, **options):
        place = Container(await callers.next(), IMAGE, [ADDRESS], volatile)
        captured = await node.capture(dataclasses.replace(request(words), name="other"), nothing, Phases(), place.open)
        await place.close()
    async with container(tmp_path / "three", callers.folder, **options):
        place = Container(await callers.next(), IMAGE, [ADDRESS], volatile)
        replica = await node.restore_into(place, "other", captured.snapshot, Phases())
        hosts = place.host_pids()
        for process in captured.snapshot.manifest.processes:
            assert rights(hosts[process.pid]) == rights(place.pid)
        user = options.get("user", 0)
        assert f"Uid:\t{user}\t{user}\t{user}\t{user}" in rights(place.pid)
        assert captured.snapshot.manifest.canary
        assert await answer_of(replica.engine) == json.loads(captured.snapshot.manifest.canary.answer)


async def test_another_user_s_process_is_refused_in_words_where_its_limits_cannot_be_read(
    node: Node, callers: Callers, tmp_path: Path
) -> None:
    if has_resource_capability():
        pytest.skip("this machine's root has CAP_SYS_RESOURCE, and reads everybody's limits")
    words = [str(PYTHON), str(SERVER), str(PORT), "1", str(MAPPED)]
    async with container(tmp_path / "two", callers.folder, user=1000, capabilities=[]):
        place = Container(await callers.next(), IMAGE, [ADDRESS])
        with pytest.raises(CriuError, match=r"runs as user 1000, group 1000.* CAP_SYS_RESOURCE"):
            await node.capture(dataclasses.replace(request(words), name="other"), nothing, Phases(), place.open)


def has_resource_capability() -> bool:
    effective = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    return bool(int(effective, 16) & CAP_SYS_RESOURCE)


@pytest.mark.parametrize("empty_dirs", [(), ("/tmp",)])
async def test_a_root_that_cannot_be_written(node: Node, callers: Callers, tmp_path: Path, empty_dirs: tuple[str, ...]) -> None:
    """As hardening guides ask for it, with and without an emptyDir for temporary files."""
    plain = dataclasses.replace(request([str(PYTHON), str(SERVER), str(PORT), "8", str(MAPPED), "--child"]), name="hard")
    async with container(tmp_path / "two", callers.folder, read_only=True, empty_dirs=empty_dirs):
        place = Container(await callers.next(), IMAGE, [ADDRESS], empty_dirs)
        captured = await node.capture(plain, nothing, Phases(), place.open)
        await place.close()
    async with container(tmp_path / "three", callers.folder, read_only=True, empty_dirs=empty_dirs):
        place = Container(await callers.next(), IMAGE, [ADDRESS], empty_dirs)
        replica = await node.restore_into(place, "hard", captured.snapshot, Phases())
        assert captured.snapshot.manifest.canary
        assert await answer_of(replica.engine) == json.loads(captured.snapshot.manifest.canary.answer)
