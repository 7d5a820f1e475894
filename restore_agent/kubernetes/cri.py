"""The node's container runtime, asked through its CRI socket: which container a process is pid 1 of.

containerd and CRI-O answer alike in all that is used here; the pid is in their verbose answers, as JSON that is theirs, so what is missing
there is an error and not a guess.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from zerowake_proto import cri_pb2, cri_pb2_grpc

from restore_agent.errors import AgentError

SOCKETS = (Path("/run/containerd/containerd.sock"), Path("/run/crio/crio.sock"))
_SECONDS = 5.0
# The end of a container's cgroup: `/…/<id>`, `/…/cri-containerd-<id>.scope`, `/…/crio-<id>.scope`.
_ID = re.compile(r"(?:^|[/-])([0-9a-f]{64})(?:\.scope)?$")


class CriError(AgentError):
    """The runtime does not answer, or does not know what it is asked for."""


@dataclass(frozen=True)
class Described:
    """A container, as its runtime and the kubelet know it."""

    id: str
    name: str
    pid: int
    image: str  # by digest
    pod: str
    pod_uid: str
    namespace: str
    addresses: tuple[str, ...]  # of its pod; none in the node's own network
    command: tuple[str, ...] = ()  # as it was made with, by plugins too
    log: str = ""  # the node's file in which the runtime keeps what it prints


class Cri:
    """Use `async with Cri.connected(socket)`."""

    def __init__(self, channel: grpc.aio.Channel, socket: Path) -> None:
        self._runtime = cri_pb2_grpc.RuntimeServiceStub(channel)
        self._socket = socket

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, socket: Path | None) -> AsyncIterator[Cri]:
        """None: the first of the usual sockets that is there. Raises CriError."""
        path = socket or next((path for path in SOCKETS if path.is_socket()), None)
        if path is None:
            raise CriError(f"no container runtime listens on {' or '.join(map(str, SOCKETS))}; name its socket with --cri")
        # A Go server refuses the escaped path that gRPC would send as the authority.
        async with grpc.aio.insecure_channel(f"unix:{path}", options=[("grpc.default_authority", "localhost")]) as channel:
            cri = cls(channel, path)
            with cri._errors("answer"):
                await cri._runtime.Version(cri_pb2.VersionRequest(), timeout=_SECONDS)
            yield cri

    async def of_process(self, pid: int) -> Described:
        """The container that this process is pid 1 of. Raises CriError: it is not."""
        found = container_id(pid)
        if not found:
            raise CriError(f"process {pid} is in no container's cgroup")
        described = await self.describe(found)
        if described.pid != pid:
            raise CriError(f"process {pid} is not pid 1 of its container {described.id[:12]}")
        return described

    async def describe(self, container: str) -> Described:
        """Raises CriError."""
        request = cri_pb2.ContainerStatusRequest(container_id=container, verbose=True)
        with self._errors(f"describe container {container[:12]}"):
            answer = await self._runtime.ContainerStatus(request, timeout=_SECONDS)
            about = _info(answer.info)
            sandbox = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=str(about["sandboxID"]))
            network = (await self._runtime.PodSandboxStatus(sandbox, timeout=_SECONDS)).status.network
            status, labels = answer.status, answer.status.labels
            return Described(
                id=status.id,
                name=labels["io.kubernetes.container.name"],
                pid=int(about["pid"]),
                image=status.image_ref,
                pod=labels["io.kubernetes.pod.name"],
                pod_uid=labels["io.kubernetes.pod.uid"],
                namespace=labels["io.kubernetes.pod.namespace"],
                addresses=tuple(filter(None, (network.ip, *(other.ip for other in network.additional_ips)))),
                command=tuple(about["runtimeSpec"]["process"]["args"]),
                log=status.log_path,
            )

    @contextlib.contextmanager
    def _errors(self, what: str) -> Any:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise CriError(f"the container runtime at {self._socket} cannot {what}: {error.details() or error.code().name}") from None
        except (KeyError, ValueError, TypeError) as error:
            raise CriError(
                f"the container runtime at {self._socket} answered without {error} when asked to {what}; is it too old?"
            ) from None


def container_id(pid: int) -> str:
    """Of the container whose cgroup this process is in; empty: none. Raises CriError: the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError as error:
        raise CriError(f"process {pid} has ended: {error.strerror}") from None
    for line in lines:
        if found := _ID.search(line):
            return found[1]
    return ""


def _info(info: Mapping[str, str]) -> dict[str, Any]:
    about = json.loads(info["info"])
    if not isinstance(about, dict):
        raise TypeError("an object")
    return about
