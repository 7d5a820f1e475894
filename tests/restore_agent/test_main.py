"""The agent as a program: its socket, its end, and the end of what runs beside it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from zerowake_proto import agent_pb2 as pb
from zerowake_proto import agent_pb2_grpc

from restore_agent.programs.main import Sharing, run, serving, socket_of
from restore_agent.sequences.node import Node
from restore_agent.snapshots.store import StoreBusy
from tests.worlds import travelling
from tests.worlds.certificates import Authority
from tests.worlds.peers import fleet_files
from tests.worlds.waiting import until


async def test_its_socket_is_root_s_alone_and_goes_with_it(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    socket_of(tmp_path).touch()  # of an agent that was killed
    async with serving("test", tmp_path, tmp_path / "gpumem.sock"):
        assert stat.S_IMODE(socket_of(tmp_path).stat().st_mode) == 0o600
        async with grpc.aio.insecure_channel(f"unix:{socket_of(tmp_path)}") as channel:
            first = await anext(aiter(agent_pb2_grpc.AgentStub(channel).Watch(pb.WatchRequest())))
        assert first.node.name == "test"
    assert not socket_of(tmp_path).exists()


async def test_a_second_agent_of_a_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    async with serving("test", tmp_path, tmp_path / "gpumem.sock"):
        with pytest.raises(StoreBusy):
            async with serving("other", tmp_path, tmp_path / "gpumem.sock"):
                pass
        assert socket_of(tmp_path).is_socket()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_and_what_runs_beside_it(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "memory").mkdir()
    said: list[str] = []

    async def beside(node: Node) -> None:
        said.append(node.name)
        try:
            await asyncio.Event().wait()
        finally:
            said.append("ended")

    running = asyncio.create_task(run("test", tmp_path, tmp_path / "gpumem.sock", None, beside=beside))
    await until(lambda: said)
    os.kill(os.getpid(), number)
    await asyncio.wait_for(running, 20)
    assert said == ["test", "ended"] and not socket_of(tmp_path).exists()


async def test_what_runs_beside_it_ends_it_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()

    async def beside(_: Node) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        await asyncio.wait_for(run("test", tmp_path, tmp_path / "gpumem.sock", None, beside=beside), 20)
    assert not socket_of(tmp_path).exists()


async def test_a_snapshot_is_staged_on_an_agent_that_never_had_it_from_another(tmp_path: Path, short_folder: Path) -> None:
    """The answer and the stream name it; the port of each is told; without --peers the call says why not; what does not fit stays away."""
    fleet_files(tmp_path / "tls", Authority("fleet"))
    sharing = Sharing("127.0.0.1:0", tmp_path / "tls", 1e9)
    states = {name: short_folder / name for name in ("one", "two", "alone")}
    for state in states.values():
        (state / "memory").mkdir(parents=True)
    with travelling.node(states["one"]) as store:
        snapshot = travelling.take(store, tmp_path / "model")
        fits = snapshot.manifest.fits.model_copy(update={"kernel": "1.0"})
        foreign = travelling.take(store, tmp_path / "model", name="foreign", fits=fits)
        public = store.keyring.public_file(store.keyring.signing)
        assert public
    for name in ("two", "alone"):
        with travelling.node(states[name]) as store:
            store.keyring.trust(public.read_bytes())
    async with (
        serving("one", states["one"], tmp_path / "gpumem.sock", sharing=sharing),
        serving("two", states["two"], tmp_path / "gpumem.sock", sharing=sharing),
        serving("alone", states["alone"], tmp_path / "gpumem.sock"),
        called(states["one"]) as one,
        called(states["two"]) as two,
        called(states["alone"]) as alone,
    ):
        there = await port(one)
        assert there and await port(two) not in (0, there) and not await port(alone)
        wanted = pb.StageRequest(
            request_id="1",
            snapshot=pb.SnapshotRef(namespace="default", name="small", digest=snapshot.digest),
            rung=pb.RUNG_DISK,
            peers=[pb.Peer(node="one", address=f"127.0.0.1:{there}", complete=True), pb.Peer(node="two", address="127.0.0.1:1")],
        )
        answer = await two.Stage(wanted)
        assert (answer.residency.snapshot, answer.residency.rung) == (wanted.snapshot, pb.RUNG_DISK)
        assert await two.Stage(wanted) == answer, "it is done once"
        with pytest.raises(grpc.aio.AioRpcError, match=r"started without --peers"):
            await alone.Stage(wanted)
        with pytest.raises(grpc.aio.AioRpcError, match=r"it was taken on kernel 1\.0, this node runs") as refused:
            await two.Stage(
                pb.StageRequest(
                    request_id="3",
                    snapshot=pb.SnapshotRef(namespace="default", name="foreign", digest=foreign.digest),
                    rung=pb.RUNG_DISK,
                    peers=wanted.peers,
                )
            )
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        wanted.request_id, wanted.peers[0].address = "2", "nowhere"
        with pytest.raises(grpc.aio.AioRpcError, match=r"peers\[0\].address: 'nowhere' is not HOST:PORT"):
            await alone.Stage(wanted)


@contextlib.asynccontextmanager
async def called(state: Path) -> AsyncIterator[agent_pb2_grpc.AgentAsyncStub]:
    async with grpc.aio.insecure_channel(f"unix:{socket_of(state)}") as channel:
        yield agent_pb2_grpc.AgentStub(channel)


async def port(agent: agent_pb2_grpc.AgentAsyncStub) -> int:
    return (await anext(aiter(agent.Watch(pb.WatchRequest())))).node.peer_port
