"""The agent as a program: its socket, its end, and the end of what runs beside it."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from pathlib import Path

import grpc
import pytest
from zerowake_proto import agent_pb2 as pb
from zerowake_proto import agent_pb2_grpc

from restore_agent.programs.main import run, serving, socket_of
from restore_agent.sequences.node import Node
from restore_agent.snapshots.store import StoreBusy
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
