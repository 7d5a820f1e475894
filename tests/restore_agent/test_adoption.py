"""Engines of pods that run already: they serve as replicas, once they are healthy, whoever started them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.engine.control import Control
from restore_agent.kubernetes import adoption
from restore_agent.kubernetes.cri import Cri, CriError, Described
from restore_agent.places.container import Container
from restore_agent.programs.on_kubernetes import pods_served
from restore_agent.sequences.node import Node
from restore_agent.sequences.replicas import Origin, State
from restore_agent.service import metrics
from restore_agent.workload import control_directory, renewal
from tests.worlds.agent import PORT
from tests.worlds.captured import ADDRESS, IMAGE
from tests.worlds.containers import answering
from tests.worlds.image import PYTHON
from tests.worlds.kubelet import COMMAND, NAMESPACE, PLACEHOLDER, Kubelet
from tests.worlds.processes import stands_in_open
from tests.worlds.waiting import until

pytestmark = pytest.mark.usefixtures("needs_runc")
TOLD = {"zerowake.dev/container": "engine", "zerowake.dev/port": "8000", "zerowake.dev/health": "/health"}

# It serves once the agent's word has reached it.
# The container has Python, and nothing of ours.
OURS = {each.__name__: Path(each.__file__).read_text() for each in (renewal, control_directory)}
ASLEEP = f"""
import sys, types
def module(name, source=""):
    sys.modules[name] = made = types.ModuleType(name)
    exec(source, made.__dict__)
    return made
module("restore_agent"), module("restore_agent.workload")
for name, source in {OURS!r}.items():
    setattr(sys.modules["restore_agent.workload"], name.rpartition(".")[2], module(name, source))
from restore_agent.workload.control_directory import ControlDirectory
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
ControlDirectory.from_environment().take_part(lambda: None, lambda moved: HTTPServer(("", 8000), Handler).serve_forever())
"""

# It stands for the runtime's own process, which becomes what the container was made with.
LATE = """
import os, sys, time
while not os.path.exists("/run/zerowake/control/begin"):
    time.sleep(0.01)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
async def node(kubelet: Kubelet, tmp_path: Path) -> AsyncIterator[Node]:
    async with (
        Node.open("node", tmp_path / "state", tmp_path / "memory", tmp_path / "gpumem.sock", metrics) as node,
        pods_served(node, kubelet.placeholder, tmp_path / "cri.sock", tmp_path),
    ):
        yield node


async def test_a_labelled_pod_that_runs_its_own_command_is_a_replica(node: Node, kubelet: Kubelet) -> None:
    async with kubelet.pod("one", {"zerowake.dev/snapshot": "small"}, TOLD, bare=True):
        await until(lambda: len(node.replicas))
        (replica,) = node.replicas
        assert (replica.origin, replica.namespace, replica.model) == (Origin.COLD, NAMESPACE, "small")
        await kubelet.api.remove("pods", NAMESPACE, "one")
        await until(lambda: replica.state is State.RETIRING)


async def test_one_that_could_not_be_looked_at_for_a_moment_is_looked_at_again(
    node: Node, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the runtime begins anew: the next word of the pod will do."""
    describe, refused = Cri.describe, asyncio.Event()

    async def away(cri: Cri, container: str) -> Described:
        if not refused.is_set():
            refused.set()
            raise CriError("containerd does not answer")
        return await describe(cri, container)

    monkeypatch.setattr(Cri, "describe", away)
    async with kubelet.pod("one", {"zerowake.dev/snapshot": "small"}, TOLD, bare=True):
        await refused.wait()
        await until(lambda: "takes no part in serving" in caplog.text)
        await kubelet.api.change("pods", NAMESPACE, "one", {"metadata": {"annotations": {**TOLD, "somebody's": "word"}}})
        await until(lambda: len(node.replicas))


async def test_an_engine_whose_agent_was_killed_before_it_stood_at_the_door_is_let_through_by_the_next_one(
    kubelet: Kubelet, tmp_path: Path
) -> None:
    async with contextlib.AsyncExitStack() as pods:
        async with answering(kubelet.placeholder) as callers:
            await pods.enter_async_context(kubelet.pod("one", {"zerowake.dev/snapshot": "small"}, TOLD))
            place = await Container(await callers.next(), IMAGE, [ADDRESS]).open()
            Control.make_doors(place)
            pid = await place.placeholder.start([str(PYTHON), "-c", ASLEEP], {})
            control, here = Control(place, pid), place.host_pids()[pid]
            await until(lambda: control.is_ready and stands_in_open(here, here))
            control.write(control_directory.RESTORE_COMPLETE, "")
            place.keep(pid, PORT)
            place.let_go()
        async with (
            Node.open("node", tmp_path / "state", tmp_path / "memory", tmp_path / "gpumem.sock", metrics) as node,
            pods_served(node, kubelet.placeholder, tmp_path / "cri.sock", tmp_path),
        ):
            await until(lambda: len(node.replicas))
            (replica,) = node.replicas
            assert replica.origin is Origin.RESTORED
            async with asyncio.timeout(20):
                await replica.engine.wait_healthy()


async def test_a_capture_pod_without_a_placeholder_has_failed(node: Node, kubelet: Kubelet) -> None:
    async with kubelet.pod("capture", {"zerowake.dev/capture": "small"}, TOLD, bare=True):
        why = await kubelet.event("capture", "CaptureFailed")
        assert "was not connected to the container runtime" in why
        await until(lambda: "zerowake.dev/capture-failed" in kubelet.api.objects["pods", NAMESPACE, "capture"]["metadata"]["annotations"])
    assert not len(node.replicas)


async def test_a_capture_pod_that_waited_in_vain_for_an_agent_and_became_its_command_has_failed(
    node: Node, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "_BEGIN_SECONDS", 0.1)
    made_with = (PLACEHOLDER, "--", *COMMAND)
    async with kubelet.pod("capture", {"zerowake.dev/capture": "small"}, TOLD, bare=True, made_with=made_with):
        assert "was not connected to the container runtime" in await kubelet.event("capture", "CaptureFailed")


async def test_a_capture_pod_whose_first_process_is_still_the_runtime_s_is_waited_for(node: Node, kubelet: Kubelet) -> None:
    """Its status says that it runs, and a busy runtime has not come to its command yet. The call fails here by what it says of itself."""
    made_with = (PLACEHOLDER, "--", *COMMAND)
    late = (str(PYTHON), "-c", LATE, *made_with)
    told = {**TOLD, "zerowake.dev/canary": '{"path": "no/slash"}'}
    async with kubelet.pod("capture", {"zerowake.dev/capture": "small"}, told, command=late, bare=True, made_with=made_with) as pod:
        await until(lambda: kubelet.is_looked_at("capture"))
        (pod.folder / "control/begin").touch()
        assert "does not begin with /" in await kubelet.event("capture", "CaptureFailed")


async def test_a_pod_that_names_no_snapshot_and_no_port_is_left_alone(
    node: Node, kubelet: Kubelet, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = {**TOLD, "zerowake.dev/port": "none"}
    async with kubelet.pod("one", {"zerowake.dev/snapshot": "small"}, wrong, bare=True), kubelet.pod("two", {"app": "x"}, TOLD, bare=True):
        await until(lambda: "pod team/one takes no part in serving: annotation zerowake.dev/port" in caplog.text)
    assert not len(node.replicas)
    assert "team/two" not in caplog.text
