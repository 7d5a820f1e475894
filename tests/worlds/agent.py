"""A real agent in a process of its own, a client of its gRPC, and a look at what is left on the machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from zerowake_proto import agent_pb2 as pb
from zerowake_proto import agent_pb2_grpc

from restore_agent.snapshots.catalog import Catalog
from zerowake_shared.network_namespace import NetworkNamespace

ENGINE = Path(__file__).with_name("hashing_engine.py")
PORT = 8000
# Else an agent that is slow to listen, on a busy machine, is asked again after 1, 2, 5, 9, 16, 27 seconds.
_OFTEN = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 200)]


def engine(mapped: Path, mebibytes: int = 8, *arguments: str, timeout: float = 20.0) -> pb.Engine:
    """The server of hashing_engine.py; `mapped`: the file that it maps."""
    command = [sys.executable, str(ENGINE), str(PORT), str(mebibytes), str(mapped), *arguments]
    return pb.Engine(
        command=command,
        env={"PATH": os.environ["PATH"]},
        directory="/",
        port=PORT,
        health_path="/health",
        ready_timeout_seconds=timeout,
    )


@dataclass
class Agent:
    """A running agent: its process, its state folder, and the calls that the tests make."""

    process: asyncio.subprocess.Process
    state: Path
    stub: agent_pb2_grpc.AgentAsyncStub

    async def snapshot(self, name: str, wanted: pb.Engine, **fields: object) -> pb.SnapshotResult:
        updates = [update async for update in self.snapshot_updates(name, wanted, **fields)]
        return updates[-1].result

    def snapshot_updates(self, name: str, wanted: pb.Engine, **fields: object) -> grpc.aio.UnaryStreamCall:
        fields.setdefault("canary", pb.Canary(path="/sum"))
        request = pb.SnapshotRequest(
            request_id=secrets.token_hex(4),
            snapshot=pb.SnapshotRef(namespace="default", name=name),
            model=name,
            engine=wanted,
            **fields,
        )
        return self.stub.Snapshot(request)

    async def restore(self, name: str, **fields: object) -> pb.RestoreResponse:
        fields.setdefault("request_id", secrets.token_hex(4))
        return await self.stub.Restore(pb.RestoreRequest(model=name, snapshot=reference(name), **fields))

    async def stage(self, name: str, rung: pb.Rung = pb.RUNG_MEMORY, **fields: float) -> pb.StageResponse:
        request = pb.StageRequest(request_id=secrets.token_hex(4), snapshot=reference(name), rung=rung, **fields)
        return await self.stub.Stage(request)

    async def unstage(self, name: str, rung: pb.Rung = pb.RUNG_DISK, *, weights: bool = False) -> pb.UnstageResponse:
        request = pb.UnstageRequest(request_id=secrets.token_hex(4), snapshot=reference(name), rung=rung, weights=weights)
        return await self.stub.Unstage(request)

    async def demote(self, replica: pb.Replica, rung: pb.Rung = pb.RUNG_STANDBY, **fields: float) -> str:
        request = pb.DemoteRequest(request_id=secrets.token_hex(4), replica_id=replica.id, rung=rung, **fields)
        return (await self.stub.Demote(request)).released_reason

    async def rung(self, name: str) -> pb.Rung:
        async for update in self.stub.Watch(pb.WatchRequest()):
            if update.residency.snapshot.name == name:
                return update.residency.rung
            if update.synced:
                break
        raise AssertionError(f"no snapshot {name}")

    async def until_rung(self, name: str, rung: pb.Rung) -> None:
        """Waits, with a deadline, until it stands there."""
        async with asyncio.timeout(30):
            async for update in self.stub.Watch(pb.WatchRequest()):
                if update.residency.snapshot.name == name and update.residency.rung == rung:
                    return

    async def live_replicas(self) -> set[str]:
        """Ids of the replicas that it has."""
        found = set()
        async for update in self.stub.Watch(pb.WatchRequest()):
            if update.synced:
                break
            if update.HasField("replica"):
                found.add(update.replica.id)
        return found

    def recorded_answer(self, name: str = "small") -> object:
        """What the source of a snapshot gave."""
        canary = Catalog(self.state).get("default", name).manifest.canary
        assert canary is not None
        answer: object = json.loads(canary.answer)
        return answer

    async def release(self, replica: pb.Replica) -> None:
        await self.stub.Release(pb.ReleaseRequest(request_id=secrets.token_hex(4), replica_id=replica.id))

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)


def reference(name: str) -> pb.SnapshotRef:
    return pb.SnapshotRef(namespace="default", name=name)


@contextlib.asynccontextmanager
async def running(state: Path, *options: str, program: str = "scaler.programs.cli") -> AsyncIterator[Agent]:
    """An agent over this state folder; it must end by itself when told to, with nothing left, unless a test killed it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        program,
        "agent",
        "--state",
        str(state),
        *options,
        stderr=(state.parent / "agent.log").open("ab"),
    )
    try:
        async with grpc.aio.insecure_channel(f"unix:{state / 'agent.sock'}", _OFTEN) as channel:
            async with asyncio.timeout(60):
                await channel.channel_ready()
            yield Agent(process, state, agent_pb2_grpc.AgentStub(channel))
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await asyncio.wait_for(process.wait(), 20)


def get(replica: pb.Replica, path: str) -> object:
    """GET of the engine in the replica's net namespace; raises OSError where it does not answer."""
    return _asked(replica, "GET", path, seconds=10)


def post(replica: pb.Replica, path: str, body: object) -> object:
    """The same with JSON, of what an engine has to work for."""
    return _asked(replica, "POST", path, json.dumps(body).encode(), seconds=60)


def _asked(replica: pb.Replica, method: str, path: str, body: bytes = b"", *, seconds: float) -> object:
    raw = b""
    head = f"{method} {path} HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    with NetworkNamespace(replica.endpoint.netns) as network, network.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        connection.connect((replica.endpoint.host, replica.endpoint.port))
        connection.sendall(head.encode() + b"\r\n" + body)
        while data := connection.recv(1 << 16):
            raw += data
    said, _, content = raw.partition(b"\r\n\r\n")
    if b" 200 " not in said.split(b"\r\n")[0]:
        raise OSError(f"{path} answered {said[:80]!r}")
    return json.loads(content)


def copy_state(state: Path, target: Path) -> Path:
    """A state folder of its own, for a test that spoils it."""
    shutil.copytree(state, target, symlinks=True, ignore=shutil.ignore_patterns("agent.sock", "memory"))
    return target
