"""Parsers of the restore agent in a cluster: what the container runtime and the API server send it of pods."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
from zerowake_proto import nri_pb2, ttrpc_pb2

from restore_agent.kubernetes import nri, ttrpc
from restore_agent.kubernetes.calling_pod import CallingPod, Refused
from restore_agent.kubernetes.cri import Described
from restore_agent.kubernetes.pod import Pod
from tests.fuzz.parser import Parser

# --- the container runtime


def _call(method: str, message: object) -> bytes:
    request = ttrpc_pb2.Request(service="nri.pkg.api.v1alpha1.Plugin", method=method, payload=message.SerializeToString())  # type: ignore[attr-defined]
    payload = request.SerializeToString()
    whole = ttrpc._HEADER.pack(len(payload), 1, ttrpc._REQUEST, 0) + payload
    return ttrpc._FRAME.pack(ttrpc._INWARDS, len(whole)) + whole


def _configure(name: str, version: str) -> nri_pb2.ConfigureRequest:
    return nri_pb2.ConfigureRequest(runtime_name=name, runtime_version=version)


_CALLS = (
    _call("Configure", _configure("containerd", "v2.2.0")),
    _call("Synchronize", nri_pb2.SynchronizeRequest()),
    _call(
        "CreateContainer",
        nri_pb2.CreateContainerRequest(pod=nri_pb2.PodSandbox(name="a"), container=nri_pb2.Container(name="b", args=["c"])),
    ),
    _call("Configure", _configure("cri-o", "1.33")),
)


class _Nowhere:
    """Takes what is answered."""

    def write(self, data: bytes) -> None:
        assert data

    def close(self) -> None:
        """There is nothing behind it."""

    async def wait_closed(self) -> None:
        """It is."""


async def _hear(data: bytes) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    plugin = nri._Plugin(Path("/nowhere"), lambda pod, container: nri_pb2.ContainerAdjustment())
    connection = ttrpc.Connection(reader, _Nowhere(), plugin._answer)  # type: ignore[arg-type]
    try:
        await connection.ended
    except ttrpc.TtrpcError:
        pass  # it ends so, whatever came
    finally:
        if plugin._asked.done():
            plugin._asked.exception()


_LOOP = asyncio.new_event_loop()


# --- pods


def _pod(**annotations: str) -> bytes:
    about = {"name": "chat-1", "namespace": "default", "labels": {"zerowake.dev/snapshot": "chat"}}
    about["annotations"] = {f"zerowake.dev/{key}": value for key, value in annotations.items()}  # type: ignore[assignment]
    container = {
        "name": "engine",
        "command": ["serve"],
        "ports": [{"containerPort": 80, "name": "http"}],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}},
    }
    return json.dumps({"metadata": about, "spec": {"containers": [container], "volumes": [{"name": "tmp", "emptyDir": {}}]}}).encode()


def _read_pod(data: bytes) -> None:
    """Of the API server's; what is in annotations is its tenant's."""
    try:
        pod = msgspec.json.decode(data, type=Pod)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    calling = CallingPod(None, Described("1", "engine", 1, "image", "chat-1", "uid", "default", ()), pod)  # type: ignore[arg-type]
    for read in (
        calling.check_allowed,
        calling.canary,
        calling.names,
        lambda: calling.record(("serve",)),
        lambda: calling.unanswerable(80),
    ):
        try:
            read()
        except Refused:
            continue


def parsers() -> Iterator[Parser]:
    yield Parser("nri", _CALLS, lambda data: _LOOP.run_until_complete(_hear(data)), ())
    pods = (_pod(canary='{"path": "/x", "body": {"a": 1}}', names='["a", "b"]', port="80"), _pod(canary="[" * 9000), _pod(names="[" * 9000))
    yield Parser("pod", pods, _read_pod, ())
