"""An agent of this checkout on a node of the test cluster, outside any pod of its own, and pods whose engines it captures and restores."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from zerowake_proto import agent_pb2_grpc

from gpumem.client.control import Control
from gpumem.wire.errors import PeerGone
from tests.e2e.api import Api, Object
from tests.e2e.cluster.control import enter, import_archives
from tests.e2e.cluster.images import IMAGES, build
from tests.e2e.cluster.layout import NODE

IMAGE = "zerowake.test/engine:1"
PORT = 8000


@dataclass
class Agent:
    """An agent on a node: its folder is this machine's too, and so its socket can be connected to from here."""

    folder: Path
    placeholder: Path  # on the node
    node: str = NODE
    program: str = "-m scaler.programs.cli"  # Python's words for it
    begun: int = 0  # where in its log the one that runs began

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """The process is nsenter's; `pid` is written by the agent's shell, as the node sees it."""
        options = f"--node {self.node} --state {self.state} --placeholder {self.placeholder} --gpumem {self.folder}/gpumem.sock"
        script = f"echo $$ >{self.folder}/pid && exec {sys.executable} {self.program} agent --kubernetes {options}"
        self.begun = len(self.log())
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen([*enter(self.node), "sh", "-c", script], stdout=log, stderr=log)
        try:
            yield process
        finally:
            self.signal(signal.SIGTERM)
            process.wait(30)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(FileNotFoundError):
            kill = f"kill -{int(number)} {(self.folder / 'pid').read_text()}"  # the shell's own: a bare Debian has no other
            subprocess.run([*enter(self.node), "sh", "-c", kill], check=False, capture_output=True)

    @contextlib.asynccontextmanager
    async def stub(self) -> AsyncIterator[agent_pb2_grpc.AgentAsyncStub]:
        async with grpc.aio.insecure_channel(f"unix:{self.state / 'agent.sock'}") as channel:
            async with asyncio.timeout(60):
                await channel.channel_ready()
            yield agent_pb2_grpc.AgentStub(channel)

    async def ready(self) -> None:
        """Until it serves pods."""
        async with asyncio.timeout(60):
            while "are restored into" not in self.log()[self.begun :]:
                await asyncio.sleep(0.1)  # a log tells nobody that it grew

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def node_agent(folder: Path, program: str = Agent.program) -> Iterator[Agent]:
    """One that does not run yet, on the first node; it has the image of its pods."""
    (image,) = (each for each in IMAGES if each.name == IMAGE)
    if not image.built():
        build()
    import_archives([image.archive])  # zerowake's own are not needed: the agent is this checkout's
    name = f"zerowake-{secrets.token_hex(3)}"
    agent = Agent(folder, Path(f"/run/{name}/placeholder"), program=program)
    yield agent
    subprocess.run([*enter(), "rm", "-rf", f"/run/{name}"], check=True)
    shutil.rmtree(agent.folder)


def pod(agent: Agent, name: str, labels: dict[str, str], command: list[str], **spec: Any) -> Object:
    """As the webhook leaves it, on the agent's node."""
    engine: Object = {
        "name": "engine",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "command": command,
        "env": [{"name": "WORDS", "value": f"{PORT} 16 /mapped"}],
    }
    if "zerowake.dev/capture" not in labels:
        engine["readinessProbe"] = {"httpGet": {"path": "/health", "port": PORT}, "periodSeconds": 1}
    told = {"container": "engine", "port": str(PORT), "health": "/health", "model": "small", "canary": json.dumps({"path": "/sum"})}
    engine.update(spec.pop("container", {}))
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels, "annotations": {f"zerowake.dev/{key}": value for key, value in told.items()}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": agent.node},
            "restartPolicy": "Never" if "zerowake.dev/capture" in labels else "Always",
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "containers": [engine],
            **spec,
        },
    }


async def captured_or_not(api: Api, namespace: str, name: str) -> dict[str, str]:
    """The annotations of a capture pod when it has ended."""
    done = await api.until("Pod", namespace, f"capture-{name}", lambda one: one and one["status"]["phase"] in ("Succeeded", "Failed"), 120)
    assert done
    found: dict[str, str] = done["metadata"]["annotations"]
    return found


async def answer(address: str, path: str = "/sum") -> Any:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as session,
        session.get(f"http://{address}:{PORT}{path}") as response,
    ):
        assert response.status == 200
        return await response.json()


async def events(api: Api, namespace: str, name: str, *reasons: str) -> list[tuple[str, str]]:
    """Of the agent about a pod, once these reasons are among them."""
    async with asyncio.timeout(60):
        while True:
            every = await api.list("Event", namespace)
            found = [(one["reason"], one["message"]) for one in every if one["involvedObject"]["name"] == name]
            if set(reasons) <= {reason for reason, _ in found}:
                return found
            await asyncio.sleep(0.2)  # events are many: they are listed


async def run_in(namespace: str, name: str, script: str) -> str:
    command = [*enter(), "kubectl", "exec", "-n", namespace, name, "--", "sh", "-c", f"{script} 2>&1; true"]
    return (await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)).stdout


async def wanted_bytes(gpumem: list[str], agent: Agent) -> int:
    for _ in range(100):
        try:
            async with Control.connected(agent.folder / "gpumem.sock") as control:
                return (await control.status()).devices[0].wanted_bytes
        except PeerGone:
            await asyncio.sleep(0.05)  # it starts
    raise AssertionError("gpumem does not answer")
