"""What a kubelet does with pods: objects in Kubernetes' API, containers that runc makes, and the runtime that knows both."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from zerowake_proto import nri_pb2

from restore_agent.kubernetes.nri import Adjust
from tests.worlds.agent import PORT
from tests.worlds.container_runtime import ContainerRuntime
from tests.worlds.containers import Running, container
from tests.worlds.image import MAPPED, PYTHON, SERVER
from tests.worlds.kubernetes_api import Api
from tests.worlds.waiting import until

COMMAND = (str(PYTHON), str(SERVER), str(PORT), "8", str(MAPPED))
NAMESPACE = "team"
PLACEHOLDER = "/run/zerowake/bin/zerowake-placeholder"  # inside


class Kubelet:
    def __init__(self, api: Api, runtime: ContainerRuntime, folder: Path) -> None:
        self.api = api
        self._runtime = runtime
        self.folder = folder
        self._running: dict[str, Running] = {}
        self.placeholder = folder / "bin"  # the agent's folder
        self.adjust: Adjust | None = None  # the agent's plugin, whose mounts and variables containers get, too

    @contextlib.asynccontextmanager
    async def pod(
        self,
        name: str,
        labels: dict[str, str],
        annotations: dict[str, str],
        *,
        command: Sequence[str] = COMMAND,
        bare: bool = False,
        made_with: Sequence[str] = (),
        env: Sequence[str] = (),
        **spec: Any,
    ) -> AsyncIterator[Running]:
        """A pod of one container that runs. `bare`: no placeholder was put before its command. `made_with`: what the runtime says that the
        container was made with, where it is not what runs in it."""
        made = {
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels, "annotations": annotations},
            "spec": {"nodeName": "node", "containers": [{"name": "engine", "ports": [{"containerPort": PORT}]}], **spec},
        }
        found = await self.api.put("pods", made)
        identity = secrets.token_hex(32)
        given = self._given(made["metadata"], command, env)
        async with container(self.folder / name, self.placeholder, command, name=identity, bare=bare, **given) as running:
            made_with = made_with or (command if bare else (PLACEHOLDER, "--", *command))
            self._runtime.add(identity, running.pid(), NAMESPACE, name, found["metadata"]["uid"], command=made_with)
            status = {"name": "engine", "containerID": f"containerd://{identity}", "state": {"running": {}}}
            await self.api.change("pods", NAMESPACE, name, {"status": {"phase": "Running", "containerStatuses": [status]}})
            self._running[name] = running
            yield running
        if self.api.get("pods", NAMESPACE, name):
            await self.api.remove("pods", NAMESPACE, name)

    def _given(self, metadata: dict[str, Any], command: Sequence[str], env: Sequence[str]) -> dict[str, Any]:
        """What a container is made with, beside what the container world gives to every one."""
        if self.adjust is None:
            return {"env": env}
        about = nri_pb2.PodSandbox(**{key: metadata[key] for key in ("name", "namespace", "labels", "annotations")})
        adjusted = self.adjust(about, nri_pb2.Container(name="engine", args=command, env=env))
        assert adjusted
        variables = dict(each.split("=", 1) for each in env) | {each.key: each.value for each in adjusted.env}
        known = ("/run/zerowake/bin", "/run/zerowake/control")
        mounts = [
            {"destination": each.destination, "type": each.type, "source": each.source, "options": list(each.options)}
            for each in adjusted.mounts
            if each.destination not in known
        ]
        filtered = adjusted.linux.HasField("seccomp_policy")
        return {"env": [f"{key}={value}" for key, value in variables.items()], "mounts": mounts, "filtered": filtered}

    def is_looked_at(self, name: str) -> bool:
        """Somebody has asked the runtime about the pod's container."""
        return self.container_of(name).rpartition("/")[2] in self._runtime.asked

    def container_of(self, name: str) -> str:
        """The runtime's id of the pod's container, as the pod's status has it."""
        status = self.api.objects["pods", NAMESPACE, name]["status"]
        return str(status["containerStatuses"][0]["containerID"])

    async def delete(self, name: str, grace_seconds: int) -> None:
        """The pod begins to go: the object says so, and its container is asked to end."""
        leaving = {"deletionTimestamp": "2026-11-26T06:00:00Z", "deletionGracePeriodSeconds": grace_seconds}
        await self.api.change("pods", NAMESPACE, name, {"metadata": leaving})
        self._running[name].kill("TERM")

    def events(self) -> list[tuple[str, str, str]]:
        """Pod, reason and note of each."""
        return [(each["regarding"]["name"], each["reason"], each["note"]) for each in self.api.all("events")]

    async def event(self, pod: str, reason: str) -> str:
        """Waits for it; its note."""
        found: list[str] = []

        def there() -> bool:
            found[:] = [note for name, said, note in self.events() if (name, said) == (pod, reason)]
            return bool(found)

        await until(there)
        return found[0]
