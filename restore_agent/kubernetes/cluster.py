"""Kubernetes' API, as the agent uses it: its node's pods, annotations, events. The only file of this room that talks to it.

Connection, TLS and credentials are the official client's; answers are decoded by msgspec into the fields that are read here (the client's
models cost milliseconds for each event of a watch). What a pod's fields say decides over rights on this node, so they are taken from here,
never from whoever asks for them. Writes are patches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import aiohttp
import msgspec
from kubernetes.aio import client, config

_LOG = logging.getLogger("zerowake.agent")
_REQUEST_SECONDS = 30.0
_WATCH_SECONDS = 290
_RESYNC_SECONDS = 600.0  # all pods are listed anew this often, whatever the watch says
_FIRST_PAUSE, _LAST_PAUSE = 0.2, 30.0
_MERGE = "application/merge-patch+json"
_LINE_BYTES = 4 << 20  # of a watch: a pod's object is 1.5 MiB at most


class ClusterError(Exception):
    """The API server could not be asked, or refused. `status` is HTTP's; 0: there was no answer."""

    def __init__(self, status: int, what: str, why: str) -> None:
        self.status = status
        super().__init__(f"{what}: {why}" + (f" (HTTP {status})" if status else ""))


class Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    deletion_timestamp: str = ""


class VolumeMount(msgspec.Struct, rename="camel"):
    name: str
    mount_path: str


class ContainerPort(msgspec.Struct, rename="camel"):
    container_port: int


class Resources(msgspec.Struct):
    limits: dict[str, str | int] = {}


class PodContainer(msgspec.Struct, rename="camel"):
    name: str
    ports: list[ContainerPort] = []
    volume_mounts: list[VolumeMount] = []
    resources: Resources = msgspec.field(default_factory=Resources)


class HostPath(msgspec.Struct):
    path: str


class Volume(msgspec.Struct, rename="camel"):
    name: str
    host_path: HostPath | None = None
    empty_dir: dict[str, Any] | None = None


class Spec(msgspec.Struct, rename="camel"):
    containers: list[PodContainer] = []
    volumes: list[Volume] = []
    host_users: bool | None = None
    host_network: bool = False
    # The API's spelling, which no rule gives.
    host_pid: bool = msgspec.field(default=False, name="hostPID")
    host_ipc: bool = msgspec.field(default=False, name="hostIPC")


class ContainerStatus(msgspec.Struct, rename="camel"):
    name: str
    container_id: str = msgspec.field(default="", name="containerID")  # of the runtime, after its scheme
    state: dict[str, Any] = {}  # one key: waiting, running, terminated


class Status(msgspec.Struct, rename="camel"):
    phase: str = ""
    container_statuses: list[ContainerStatus] = []


class Pod(msgspec.Struct):
    metadata: Metadata
    spec: Spec = msgspec.field(default_factory=Spec)
    status: Status = msgspec.field(default_factory=Status)

    def __str__(self) -> str:
        return f"{self.metadata.namespace}/{self.metadata.name}"

    @property
    def is_leaving(self) -> bool:
        return bool(self.metadata.deletion_timestamp) or self.status.phase in ("Succeeded", "Failed")


class _ListMetadata(msgspec.Struct, rename="camel"):
    resource_version: str = ""


class _Bookmark(msgspec.Struct):
    metadata: _ListMetadata


class _List(msgspec.Struct):
    metadata: _ListMetadata
    items: list[Pod] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Failure(msgspec.Struct):
    message: str = ""
    code: int = 0


class Cluster:
    """Use `async with Cluster.connected(node)`."""

    def __init__(self, api: client.ApiClient, node: str) -> None:
        self._api: Any = api  # the client has no types
        self._node = node
        self.pods: dict[str, Pod] = {}  # of this node, by uid
        self._listeners: list[Callable[[Pod, bool], None]] = []
        self._synced = asyncio.Event()

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, node: str) -> AsyncIterator[Cluster]:
        """The cluster that this pod runs in; outside of one that of `KUBECONFIG`. Returns when the node's pods are known.

        Raises:
            ClusterError: there is neither a service account nor a kubeconfig that can be used.
        """
        configuration = client.Configuration()
        try:
            config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
        except config.ConfigException as inside:
            try:
                await config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)  # type: ignore[no-untyped-call]
            except (config.ConfigException, OSError) as error:
                why = f"no service account ({inside}) and no kubeconfig ({error}); run in a pod, or set KUBECONFIG"
                raise ClusterError(0, "Kubernetes' API cannot be found", why) from error
        async with client.ApiClient(configuration) as api:
            cluster = cls(api, node)
            following = asyncio.create_task(cluster._follow(), name=f"pods of {node}")
            try:
                synced = asyncio.ensure_future(cluster._synced.wait())
                await asyncio.wait([synced, following], return_when=asyncio.FIRST_COMPLETED)
                if following.done():
                    synced.cancel()
                    following.result()
                yield cluster
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    def on_change(self, heard: Callable[[Pod, bool], None]) -> None:
        """`heard(pod, gone)` is called with each pod of the node that appears, changes or goes; at once with those that are there."""
        self._listeners.append(heard)
        for pod in list(self.pods.values()):
            heard(pod, False)

    async def pod(self, uid: str, namespace: str, name: str) -> Pod | None:
        """A pod of this node as the API server has it, by its uid; None: it is gone, or another one of that name. Raises ClusterError."""
        if pod := self.pods.get(uid):
            return pod
        try:
            found = msgspec.json.decode(await self._call("GET", f"/api/v1/namespaces/{namespace}/pods/{name}"), type=Pod)
        except ClusterError as error:
            if error.status == 404:
                return None
            raise
        if found.metadata.uid != uid:
            return None
        self._see(found)  # the watch may be broken just now, and what is not in `pods` is taken for gone
        return found

    async def annotate(self, pod: Pod, annotations: Mapping[str, str]) -> None:
        """Raises ClusterError."""
        # The uid makes it this pod and no later one of its name.
        body = {"metadata": {"uid": pod.metadata.uid, "annotations": dict(annotations)}}
        await self._call("PATCH", f"/api/v1/namespaces/{pod.metadata.namespace}/pods/{pod.metadata.name}", body=body, content=_MERGE)

    async def event(self, pod: Pod, kind: Literal["Normal", "Warning"], reason: str, note: str, action: str) -> None:
        """Writes an event about a pod. Best effort: a failure is logged, since nothing may depend on events."""
        about = pod.metadata
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"generateName": f"{about.name[:50].rstrip('.-')}-", "namespace": about.namespace},
            "eventTime": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "reportingController": "zerowake.dev/agent",
            "reportingInstance": self._node[:128],
            "regarding": {"apiVersion": "v1", "kind": "Pod", "namespace": about.namespace, "name": about.name, "uid": about.uid},
            "type": kind,
            "reason": reason,
            "action": action,
            "note": note if len(note) <= 1000 else note[:999] + "…",
        }
        try:
            await self._call("POST", f"/apis/events.k8s.io/v1/namespaces/{about.namespace}/events", body=body)
        except ClusterError as error:
            _LOG.warning("the event %s of pod %s is lost: %s", reason, pod, error)

    async def _follow(self) -> None:
        """Lists, then watches, for ever; pauses longer from failure to failure."""
        pause = _FIRST_PAUSE
        while True:
            try:
                version = await self._list()
                listed = time.monotonic()
                while time.monotonic() - listed < _RESYNC_SECONDS:
                    version = await self._watch(version)
                    pause = _FIRST_PAUSE
            except ClusterError as error:
                if error.status in (401, 403):
                    _LOG.error("the pods of node %s cannot be followed: %s", self._node, error)
                elif error.status != 410:
                    _LOG.warning("the pods of node %s are followed again in %.1f s: %s", self._node, pause, error)
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(_LAST_PAUSE, pause * 2)

    async def _list(self) -> str:
        query = {"fieldSelector": f"spec.nodeName={self._node}"}
        before = set(self.pods)  # one that `pod` finds meanwhile may be newer than the list
        found = msgspec.json.decode(await self._call("GET", "/api/v1/pods", query), type=_List)
        here = {pod.metadata.uid: pod for pod in found.items or []}
        for uid in before - here.keys():
            self._tell(self.pods.pop(uid), gone=True)
        for pod in here.values():
            self._see(pod)
        self._synced.set()
        return found.metadata.resource_version

    async def _watch(self, version: str) -> str:
        """Until the server ends the stream; returns the version that it came to. Raises ClusterError; 410: list again."""
        query = {
            "fieldSelector": f"spec.nodeName={self._node}",
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        # A bookmark comes every minute: two minutes of silence are a connection that is dead on one side only.
        bound = aiohttp.ClientTimeout(total=_WATCH_SECONDS + 30, sock_connect=10, sock_read=130)
        async with self._open("GET", "/api/v1/pods", query, bound=bound, what="watching pods") as response:
            async for line in _lines(response.content):
                event = msgspec.json.decode(line, type=_Event)
                if event.type == "ERROR":
                    failure = msgspec.json.decode(event.object, type=_Failure)
                    raise ClusterError(failure.code, "watching pods", failure.message)
                if event.type == "BOOKMARK":  # a pod of nothing but a version
                    version = msgspec.json.decode(event.object, type=_Bookmark).metadata.resource_version
                    continue
                pod = msgspec.json.decode(event.object, type=Pod)
                version = pod.metadata.resource_version
                if event.type == "DELETED":
                    self.pods.pop(pod.metadata.uid, None)
                    self._tell(pod, gone=True)
                else:
                    self._see(pod)
        return version

    def _see(self, pod: Pod) -> None:
        before = self.pods.get(pod.metadata.uid)
        self.pods[pod.metadata.uid] = pod
        if before is None or before.metadata.resource_version != pod.metadata.resource_version:
            self._tell(pod, gone=False)

    def _tell(self, pod: Pod, *, gone: bool) -> None:
        for heard in self._listeners:
            heard(pod, gone)

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        body: Mapping[str, object] | None = None,
        content: str = "application/json",
    ) -> bytes:
        bound = aiohttp.ClientTimeout(total=_REQUEST_SECONDS, sock_connect=10)
        async with self._open(method, path, query, body=body, content=content, bound=bound, what=f"{method} {path}") as response:
            return await response.read()

    @contextlib.asynccontextmanager
    async def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        body: Mapping[str, object] | None = None,
        content: str = "application/json",
        bound: aiohttp.ClientTimeout,
        what: str,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer, once its head says that all is well. Raises ClusterError."""
        headers = {"Accept": "application/json", "Content-Type": content}
        try:
            call = await self._api.param_serialize(
                method, path, query_params=list((query or {}).items()), header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            answer = await self._api.call_api(*call, _request_timeout=bound)
            response: aiohttp.ClientResponse = answer.response
            try:
                if response.status >= 400:
                    raise _refused(response.status, what, await response.read())
                yield response
            finally:
                if response.content.at_eof():
                    response.release()
                else:
                    response.close()
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as error:
            raise ClusterError(0, what, f"no answer from Kubernetes' API: {error or type(error).__name__}") from error


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """aiohttp's own lines end at 64 KiB."""
    rest = b""
    async for data in stream.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line:
                yield line
        if len(rest) > _LINE_BYTES:
            raise ClusterError(0, "watching pods", f"the API server sent a line of more than {_LINE_BYTES >> 20} MiB")


def _refused(status: int, what: str, body: bytes) -> ClusterError:
    try:
        message = msgspec.json.decode(body, type=_Failure).message
    except msgspec.DecodeError:
        message = body[:200].decode(errors="replace")
    return ClusterError(status, what, message or "no reason given")
