"""Pods of this node whose placeholders call, from the call to the pod's event: real containers, CRIU, gRPC and HTTP, and no cluster.

That a real kubelet and containerd do the same is shown by tests/e2e.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from restore_agent.programs.on_kubernetes import pods_served
from restore_agent.sequences.node import Node
from restore_agent.sequences.replicas import Origin, Replica, State
from restore_agent.snapshots.manifest import TemplateRecord
from restore_agent.workload.vllm.plugin import VLLM_ADAPTER
from tests.worlds.agent import PORT
from tests.worlds.image import PYTHON
from tests.worlds.kubelet import COMMAND, NAMESPACE, Kubelet
from tests.worlds.waiting import until
from zerowake_shared import pod_contract

pytestmark = pytest.mark.usefixtures("needs_criu", "needs_runc")
STREAMING = (str(PYTHON), "-u", "-c", (Path(__file__).parents[1] / "worlds/streaming_engine.py").read_text(), str(PORT))
# It answers with what it was started with. To the agent it is vLLM, by the words after the script.
TELLS = """
import http.server, json, os, sys
import re
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        data = json.dumps({"command": sys.argv[1:], "env": dict(os.environ)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""
RESTORED, CAPTURE = {"zerowake.dev/snapshot": "small"}, {"zerowake.dev/capture": "small"}
TOLD = {
    f"zerowake.dev/{key}": value for key, value in {"container": "engine", "port": "8000", "health": "/health", "model": "small"}.items()
}
CANARY = {"zerowake.dev/canary": json.dumps({"path": "/sum"})}


@contextlib.asynccontextmanager
async def served(node: Node, kubelet: Kubelet) -> AsyncIterator[None]:
    async with pods_served(node, kubelet.placeholder, kubelet.placeholder.with_name("cri.sock"), kubelet.folder):
        yield


def annotations(kubelet: Kubelet, name: str) -> dict[str, str]:
    found: dict[str, str] = kubelet.api.objects["pods", NAMESPACE, name]["metadata"]["annotations"]
    return found


async def replica(node: Node) -> Replica:
    await until(lambda: len(node.replicas))
    (found,) = node.replicas
    return found


def connections(to: Replica) -> int:
    """Open ones to its port, in its network."""
    lines = Path(f"/proc/{to.engine.place.host_pids()[to.engine.pid]}/net/tcp").read_text().splitlines()[1:]
    return sum(fields[1].endswith(f":{PORT:04X}") and fields[3] == "01" for fields in map(str.split, lines))


async def said(of: Replica, path: str) -> str:
    async with of.engine.session() as session:
        return (await of.engine.ask(session, path)).body


async def answer(of: Replica, path: str = "/sum") -> object:
    async with of.engine.session() as session:
        return json.loads((await of.engine.ask(session, path)).body)


async def capture(kubelet: Kubelet, command: Sequence[str] = COMMAND, canary: str = "/sum") -> str:
    """Takes the snapshot in a pod that is made for it; its digest."""
    told = {**TOLD, "zerowake.dev/canary": json.dumps({"path": canary}), "zerowake.dev/template": "a1b2", "zerowake.dev/contents": "c3d4"}
    async with kubelet.pod("capture", CAPTURE, told, command=command) as pod:
        assert await pod.exit_code() == 0, pod.log()
        return annotations(kubelet, "capture")["zerowake.dev/captured"]


async def test_captured_in_one_pod_and_restored_into_another(node: Node, kubelet: Kubelet) -> None:
    async with served(node, kubelet):
        digest = await capture(kubelet)
        assert node.store.get(NAMESPACE, "small").digest == digest
        assert node.store.get(NAMESPACE, "small").manifest.template == TemplateRecord(hash="a1b2", contents="c3d4")
        assert f"{NAMESPACE}/small@{digest[:12]}" in await kubelet.event("capture", "Captured")
        async with kubelet.pod("one", RESTORED, TOLD) as pod:
            restored = await replica(node)
            assert (restored.origin, restored.model) == (Origin.RESTORED, "small")
            assert await answer(restored) == json.loads(node.store.get(NAMESPACE, "small").manifest.canary.answer)  # type: ignore[union-attr]
            assert re.search(rf"@{digest[:12]} from (disk|memory) in [\d.]+ s ", await kubelet.event("one", "Restored"))
            # It takes no new requests from the moment at which its pod begins to go.
            await kubelet.api.change("pods", NAMESPACE, "one", {"metadata": {"deletionTimestamp": "2026-11-22T06:00:00Z"}})
            await until(lambda: restored.state is State.RETIRING)
            pod.kill("KILL")
            await until(lambda: not len(node.replicas))


async def test_an_engine_outlives_the_agent_and_is_the_next_one_s_replica(node: Node, kubelet: Kubelet) -> None:
    async with served(node, kubelet):
        await capture(kubelet)
    async with contextlib.AsyncExitStack() as pods:
        async with served(node, kubelet):
            await pods.enter_async_context(kubelet.pod("one", RESTORED, TOLD))
            first = await replica(node)
            before = await answer(first)
            await kubelet.event("one", "Restored")
        # The agent's part is over: nobody is told that the engine has ended. The same node hears of the pod anew.
        with node.changes.heard() as heard:
            await node.replicas.close()
            assert (heard.empty(), first.state, len(node.replicas)) == (True, State.READY, 0)
        async with served(node, kubelet):
            again = await replica(node)
            assert (again.origin, again.detail) == (Origin.RESTORED, "it runs, and was not restored by this agent")
            assert again.id == first.id == pod_contract.replica_id("one", kubelet.container_of("one"))
            assert await answer(again) == before


@pytest.mark.parametrize("agent", ["stays", "restarts"])
async def test_a_restored_engine_whose_pod_is_deleted_finishes_its_answers(node: Node, kubelet: Kubelet, agent: str) -> None:
    async with contextlib.AsyncExitStack() as pods:
        async with served(node, kubelet):
            await capture(kubelet, STREAMING, "/")
            pod = await pods.enter_async_context(kubelet.pod("one", RESTORED, TOLD, command=STREAMING))
            restored = await replica(node)
            assert restored.origin is Origin.RESTORED
            stream = asyncio.create_task(said(restored, "/stream?n=30&every=0.1"))
            await until(lambda: connections(restored))
            if agent == "stays":
                await kubelet.delete("one", grace_seconds=60)
                await until(lambda: restored.state is State.RETIRING)
                assert (await stream).count("data: ") == 30
                assert await pod.exit_code() == 128 + 15
                await until(lambda: not len(node.replicas))
                return
        await node.replicas.close()
        await kubelet.delete("one", grace_seconds=60)
        async with served(node, kubelet):
            again = await replica(node)
            assert (again.id, again.state) == (restored.id, State.RETIRING)
            assert (await stream).count("data: ") == 30
            await until(lambda: not len(node.replicas))


async def test_a_restored_engine_whose_container_is_asked_to_end_gets_nothing_new(node: Node, kubelet: Kubelet) -> None:
    """As where its liveness probe fails: its pod stays."""
    async with served(node, kubelet):
        await capture(kubelet, STREAMING, "/")
        async with kubelet.pod("one", RESTORED, TOLD, command=STREAMING) as pod:
            restored = await replica(node)
            asked = asyncio.create_task(said(restored, "/stream?n=10&every=0.1"))
            await until(lambda: connections(restored))
            pod.kill()
            await until(lambda: restored.state is State.RETIRING)
            assert (await asked).count("data: ") == 10


async def test_without_its_snapshot_a_pod_starts_its_own_command(node: Node, kubelet: Kubelet) -> None:
    async with served(node, kubelet), kubelet.pod("one", RESTORED, TOLD):
        assert "no snapshot team/small" in await kubelet.event("one", "RestoreFailed")
        assert "hashing_engine.py" in await kubelet.event("one", "ColdStarted")
        started = await replica(node)
        assert (started.origin, started.snapshot) == (Origin.COLD, None)
        assert await answer(started, "/health") == {}


@pytest.mark.parametrize(
    ("labels", "told", "spec", "why"),
    [
        (RESTORED, {}, {"hostPID": True}, "the pod asks for hostPID"),
        (RESTORED, {}, {"volumes": [{"name": "root", "hostPath": {"path": "/"}}]}, "volume root of the pod is a folder of the node (/)"),
        ({"zerowake.dev/snapshot": "a..b"}, {}, {}, "name 'a..b' is not allowed"),
        (RESTORED, {"zerowake.dev/container": "sidecar"}, {}, "container engine is not the pod's engine, which is sidecar"),
    ],
)
async def test_what_a_pod_may_not_have_is_refused_in_an_event_and_its_command_runs(
    node: Node, kubelet: Kubelet, labels: dict[str, str], told: dict[str, str], spec: dict[str, object], why: str
) -> None:
    async with served(node, kubelet):
        await capture(kubelet)
        async with kubelet.pod("one", labels, {**TOLD, **told}, **spec):
            assert why in await kubelet.event("one", "SnapshotRefused")
            assert (await replica(node)).origin is Origin.COLD


async def test_a_capture_that_fails_says_why_and_is_not_tried_again(node: Node, kubelet: Kubelet) -> None:
    async with served(node, kubelet):
        async with kubelet.pod("capture", CAPTURE, {**TOLD, "zerowake.dev/canary": '{"path": "no/slash"}'}) as pod:
            assert await pod.exit_code() == 1
            failed = annotations(kubelet, "capture")["zerowake.dev/capture-failed"]
            assert failed == await kubelet.event("capture", "CaptureFailed")
            assert "does not begin with /" in failed
            assert annotations(kubelet, "capture")["zerowake.dev/capture-refused"] == "true", "no other try would end in another way"
        events = len(kubelet.events())
        async with kubelet.pod("capture", CAPTURE, {**TOLD, "zerowake.dev/capture-failed": failed}) as pod:
            assert await pod.exit_code() == 1
        assert len(kubelet.events()) == events


async def test_what_else_an_engine_answers_to_is_proved_with_it(node: Node, kubelet: Kubelet) -> None:
    """LoRA adapters above all: one that breaks fails the capture by its name, and another try may end otherwise."""
    code = (Path(__file__).parents[1] / "worlds/adapter_engine.py").read_text()
    told = {**TOLD, "zerowake.dev/names": '["hidden"]'}
    async with served(node, kubelet):
        command = [str(PYTHON), "-c", code, str(PORT), "poet", "hidden"]
        async with kubelet.pod("capture", CAPTURE, told, command=command) as pod:
            assert await pod.exit_code() == 0, kubelet.events()
        assert [adapter.name for adapter in node.store.get(NAMESPACE, "small").manifest.adapters] == ["poet", "hidden"]
        assert "; proved with its adapters poet, hidden" in await kubelet.event("capture", "Captured")
        of_restored = "adapter 'dies' of the restored engine did not answer"
        for broken, why in (("dies", of_restored), ("broken", "adapter 'broken' does not answer")):
            async with kubelet.pod(broken, CAPTURE, told, command=[*command, broken]) as pod:
                assert await pod.exit_code() == 1
                assert why in await kubelet.event(broken, "CaptureFailed")
                assert "zerowake.dev/capture-refused" not in annotations(kubelet, broken)


async def started_with(
    node: Node, kubelet: Kubelet, command: Sequence[str] = (str(PYTHON), "-c", TELLS, "vllm", "serve", "m"), **more: str
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of an engine that is captured; `more`: annotations of its pod."""
    told = {**TOLD, "zerowake.dev/canary": '{"path": "/"}', **{f"zerowake.dev/{key}": value for key, value in more.items()}}
    async with kubelet.pod("capture", CAPTURE, told, command=command, env=["VLLM_HOST_IP=10.0.0.9"]) as pod:
        assert await pod.exit_code() == 0, kubelet.events()
    canary = node.store.get(NAMESPACE, "small").manifest.canary
    assert canary
    said = json.loads(canary.answer)
    return said["command"], said["env"]


async def test_an_engine_with_an_adapter_is_captured_with_it_where_gpumem_lends(node: Node, kubelet: Kubelet) -> None:
    async with served(node, kubelet):
        command, env = await started_with(node, kubelet, gpumem="true")
        assert command[:3] == ["vllm", "serve", "m"]
        assert "restore_agent.workload.vllm.worker.Worker" in command and '"/tmp/zerowake-weights"' in " ".join(command)
        assert (env["VLLM_HOST_IP"], env[VLLM_ADAPTER]) == ("10.0.0.9", "1"), "what its pod says counts"
        for more in ({}, {"gpumem": "false"}):
            command, env = await started_with(node, kubelet, **more)
            assert command == ["vllm", "serve", "m"] and VLLM_ADAPTER not in env, more


async def test_an_engine_behind_a_shell_is_captured_with_its_adapter_where_its_script_is_clear(node: Node, kubelet: Kubelet) -> None:
    started = f"exec {PYTHON} -c {shlex.quote(TELLS)}"
    async with served(node, kubelet):
        command, env = await started_with(node, kubelet, ["sh", "-c", f"A=1 {started} vllm serve m"], gpumem="true")
        assert "restore_agent.workload.vllm.worker.Worker" in command and (env["A"], env[VLLM_ADAPTER]) == ("1", "1")
        assert not [note for pod, reason, note in kubelet.events() if reason == "NotAdapted"]
        command, env = await started_with(node, kubelet, ["sh", "-c", f"{started} vllm serve $VLLM_HOST_IP"], gpumem="true")
        assert command == ["vllm", "serve", "10.0.0.9"] and VLLM_ADAPTER not in env
        assert "looked up ($): give the engine's command as a list" in await kubelet.event("capture", "NotAdapted")


async def test_an_engine_with_an_adapter_that_is_started_cold_takes_memory_as_any_other(node: Node, kubelet: Kubelet) -> None:
    """By its own command. That gpumem gives the GPU's memory back for it hangs on the annotation: test_gpu_yielding.py."""
    command = [str(PYTHON), "-c", TELLS, "vllm", "serve", "m"]
    async with served(node, kubelet), kubelet.pod("one", RESTORED, {**TOLD, "zerowake.dev/gpumem": "true"}, command=command):
        await until(lambda: annotations(kubelet, "one").get("zerowake.dev/cold"))
        assert annotations(kubelet, "one")["zerowake.dev/gpumem"] == "false"
        cold = await replica(node)
        told = json.loads(await said(cold, "/"))
        assert (told["command"], cold.origin) == (["vllm", "serve", "m"], Origin.COLD) and VLLM_ADAPTER not in told["env"]


async def test_an_engine_whose_adapter_cannot_do_what_it_is_to_do_is_refused(node: Node, kubelet: Kubelet) -> None:
    command = [str(PYTHON), "-c", TELLS, "vllm", "serve", "m", "--pipeline-parallel-size", "2"]
    async with served(node, kubelet):
        async with kubelet.pod("capture", CAPTURE, {**TOLD, **CANARY, "zerowake.dev/gpumem": "true"}, command=command) as pod:
            assert await pod.exit_code() == 1
        assert "--pipeline-parallel-size 2: a snapshot's ranks are tensor parallel alone" in await kubelet.event("capture", "CaptureFailed")


async def test_a_bug_in_one_pod_s_call_is_told_and_ends_nothing_else(
    node: Node, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    async with served(node, kubelet):
        with monkeypatch.context() as patched:
            patched.setattr(node, "capture", broken)
            async with kubelet.pod("one", CAPTURE, {**TOLD, **CANARY}):
                await until(lambda: "pod team/one: its call was answered by a bug" in caplog.text)
        assert await capture(kubelet)
