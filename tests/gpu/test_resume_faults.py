"""What goes wrong while a GPU server is restored, demoted or kept asleep: kill -9 in every phase, no memory, a driver that refuses, an
engine that fails as it wakes. After every case nothing is left, the memory is what it was, and the next restore works.

The same cases run on the host's memory where they need no GPU. Every case prints what it saw (`-s` shows it).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.drivers import cuda as cuda_module
from restore_agent.drivers.cuda import CudaError
from restore_agent.sequences.placement import HEADROOM
from restore_agent.snapshots.catalog import Catalog
from tests.worlds.device import ROOT
from tests.worlds.leftovers import nothing_left
from tests.worlds.node import MIB, NAME, Node
from tests.worlds.strike import DEMOTING, RESTORING, Case, another_in_its_place, engine_pids, failing, killing, the_agent_leaves_nothing


def _of_a_gpu(phase: str) -> bool:
    return "CUDA" in phase


@pytest.mark.parametrize("phase", RESTORING)
@pytest.mark.parametrize("victim", ["engine", "agent"])
def test_killed_while_it_is_restored(case: Case, request: pytest.FixtureRequest, victim: str, phase: str) -> None:
    if _of_a_gpu(phase):
        request.getfixturevalue("gpu_only")

    async def body(node: Node) -> None:
        agent = await node.agent()
        await agent.stage(NAME)
        async with killing(node, victim, phase) as call_began:
            began = time.monotonic()
            call = asyncio.create_task(agent.restore(NAME, cold=node.stand_in()))
            call_began(call)
        took = time.monotonic() - began
        if victim == "agent":
            await agent.process.wait()
            assert isinstance(call.exception(), grpc.aio.AioRpcError)
            await nothing_left(node.state)
            return
        answer = call.result()
        print(
            f"  answered after {took:.3f} s: {pb.Origin.Name(answer.replica.origin)} {answer.fallback_reason!r}: {answer.fallback_detail}"
        )
        if answer.replica.origin == pb.ORIGIN_COLD:
            assert answer.fallback_reason in ("criu-failed", "fill-failed", "cuda-failed", "engine-failed", "sandbox-failed")
            assert answer.fallback_detail
            await node.answers(answer.replica, {"cold": True})
        else:  # it was struck as the last step ended
            print(f"  gone: {await node.gone(answer.replica)}")
        assert took < 20

    case(body)


@pytest.mark.parametrize("victim", ["engine", "agent"])
def test_killed_when_it_serves(case: Case, victim: str) -> None:
    async def body(node: Node) -> None:
        agent = await node.agent()
        replica = await node.restored()
        if victim == "agent":
            await the_agent_leaves_nothing(node, agent)
            return
        for pid in engine_pids(node, agent):
            os.kill(pid, 9)
        said = await node.gone(replica)
        print(f"  gone: {said}")
        assert "SIGKILL" in said

    case(body)


@pytest.mark.parametrize("made", ["restored", "demoted"])
@pytest.mark.parametrize("victim", ["engine", "agent"])
def test_killed_as_a_standby(case: Case, victim: str, made: str) -> None:
    async def body(node: Node) -> None:
        agent = await node.agent()
        if made == "restored":
            await agent.stage(NAME, pb.RUNG_STANDBY)
        else:
            assert await agent.demote(await node.restored()) == ""
        if victim == "agent":
            await the_agent_leaves_nothing(node, agent)
            return
        await another_in_its_place(node, agent, pb.RUNG_STANDBY)

    case(body)


@pytest.mark.parametrize("phase", DEMOTING)
@pytest.mark.parametrize("victim", ["engine", "agent"])
def test_killed_in_a_demote(case: Case, request: pytest.FixtureRequest, victim: str, phase: str) -> None:
    if _of_a_gpu(phase):
        request.getfixturevalue("gpu_only")

    async def body(node: Node) -> None:
        agent = await node.agent()
        replica = await node.restored()
        async with killing(node, victim, phase) as call_began:
            call = asyncio.create_task(agent.demote(replica))
            call_began(call)
        if victim == "agent":
            await agent.process.wait()
            await nothing_left(node.state)
            return
        print(f"  demote answers: {call.result()!r}")
        async with asyncio.timeout(10):
            while await agent.rung(NAME) == pb.RUNG_STANDBY:
                await asyncio.sleep(0.02)  # a standby that has ended is dropped
        assert engine_pids(node, agent) == []

    case(body)


def test_the_pool_is_full(case: Case) -> None:
    async def body(node: Node) -> None:
        agent = await node.agent()
        await node.evict()
        async with node.pool_held():
            answer = await agent.restore(NAME, cold=node.stand_in())
            print(f"  {answer.fallback_reason}: {answer.fallback_detail}")
            assert answer.fallback_reason == "weights-failed"
            assert "end one of these" in answer.fallback_detail and "a client that takes all" in answer.fallback_detail
            await node.answers(answer.replica, {"cold": True})
            await agent.release(answer.replica)
        replica = await node.restored()
        await agent.release(replica)

    case(body)


@pytest.mark.usefixtures("gpu_only")
def test_the_gpu_is_full(case: Case) -> None:
    async def body(node: Node) -> None:
        agent = await node.agent()
        await agent.stage(NAME)
        async with node.pool_held():
            with node.hog(leave=_needed(node) // 2):
                answer = await agent.restore(NAME, cold=node.stand_in())
                print(f"  {answer.fallback_reason}: {answer.fallback_detail}")
                assert answer.fallback_reason == "no-gpu-memory"
                assert "end a replica" in answer.fallback_detail
                assert "image.criu" not in [phase.name for phase in answer.replica.phases], "nothing was begun"
                await node.answers(answer.replica, {"cold": True})
                await agent.release(answer.replica)
            await agent.release(await node.restored())

    case(body)


@pytest.mark.usefixtures("gpu_only")
@pytest.mark.parametrize("end", ["released", "killed"])
def test_gpumem_makes_room_on_a_full_gpu(case: Case, end: str) -> None:
    async def body(node: Node) -> None:
        agent = await node.agent()
        await agent.stage(NAME)
        before = (await node.status()).devices[0].wanted_bytes
        with node.hog(leave=_needed(node) // 2):
            replica = await node.restored()
            lent = (await node.status()).devices[0]
            print(
                f"  gpumem holds {lent.wanted_bytes / MIB:.0f} MiB of its {before / MIB:.0f}, {lent.device_free_bytes / MIB:.0f} are free"
            )
            assert lent.wanted_bytes < before
            if end == "released":
                await agent.release(replica)
            else:
                for pid in engine_pids(node, agent):
                    os.kill(pid, 9)
                await node.gone(replica)
            async with asyncio.timeout(10):
                while (found := (await node.status()).devices[0]).wanted_bytes != before or found.owed_bytes:
                    await asyncio.sleep(0.02)

    case(body)


def _needed(node: Node) -> int:
    """Bytes of the GPU that a resume takes."""
    return max(Catalog(node.state).get("default", NAME).manifest.gpus.values()) + HEADROOM


@pytest.mark.usefixtures("gpu_only")
def test_a_capture_of_an_engine_that_goes_on_computing(case: Case) -> None:
    async def body(node: Node) -> None:
        node.fault.write_text("busy")
        await refused(node, "busy", "lock pid .* within", "quiesce")

    case(body)


@pytest.mark.usefixtures("gpu_only")
def test_a_capture_with_lent_memory_still_mapped(case: Case) -> None:
    async def body(node: Node) -> None:
        node.fault.write_text("mapped")
        await refused(node, "mapped", "NOT_SUPPORTED|not supported", "unmap")

    case(body)


async def refused(node: Node, name: str, why: str, remedy: str) -> None:
    """A capture that must fail, saying why and what to do, with nothing published."""
    began = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await node.capture(name)
    said = failed.value.details() or ""
    print(f"  after {time.monotonic() - began:.1f} s: {failed.value.code()}: {said}")
    with pytest.raises(grpc.aio.AioRpcError) as missing:
        await (await node.agent()).stage(name)
    assert missing.value.code() == grpc.StatusCode.NOT_FOUND, "it was published"
    assert failed.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert re.search(why, said) and remedy in said


@pytest.mark.usefixtures("gpu_only")
def test_a_lock_that_times_out_leaves_the_engine_running(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "_LOCK_MILLISECONDS", 1000)

    async def body(node: Node) -> None:
        assert node.cuda
        region = (await node.status()).regions[0].id.hex()
        env = os.environ | {"GPUMEM_SOCKET": str(node.world.socket), "GPUMEM_REGION": region}
        with (tmp_path / "engine.log").open("wb") as log:
            engine = subprocess.Popen(
                [sys.executable, "-m", "tests.worlds.faulty_engine", "8011", "small"], cwd=ROOT, env=env, stdout=log, stderr=log
            )
        try:
            expected = await _ask_until(8011, "/sum", engine)
            await _ask_until(8011, "/busy/5", engine)
            began = time.monotonic()
            with pytest.raises(CudaError) as failed:
                await node.cuda.suspend([engine.pid])
            print(f"  after {time.monotonic() - began:.2f} s: {failed.value}")
            assert time.monotonic() - began < 4, "the deadline is a second"
            assert await _ask_until(8011, "/sum", engine) == expected
            print(f"  it answered again {time.monotonic() - began:.2f} s later")
            assert await node.cuda.suspend([engine.pid]), "when it is idle it can be suspended"
        finally:
            engine.kill()
            engine.wait()

    case(body)


async def _ask_until(port: int, path: str, process: subprocess.Popen[bytes]) -> bytes:
    """The body of the answer, as soon as somebody listens."""
    async with asyncio.timeout(60):
        while True:
            assert process.poll() is None, "the engine ended"
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.write(f"GET {path} HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            return answer.partition(b"\r\n\r\n")[2]


def test_an_engine_that_fails_as_it_wakes(case: Case) -> None:
    async def body(node: Node) -> None:
        agent = await node.agent()
        await agent.stage(NAME)
        node.fault.write_text("exit")
        said = await failing(node, agent, {pb.ORIGIN_RESTORED})
        print(f"  the replica: {said}")
        assert "exit code 70" in said and "told to fail" in said
        async with node.gateway() as ask:
            status, text, seconds = await ask()
            print(f"  the gateway, after {seconds:.2f} s: {status} {text}")
            assert status in (502, 503) and "replica" in text
            node.fault.unlink()
            status, text, seconds = await ask()
            print(f"  mended, after {seconds:.2f} s: {status} {text}")
            assert status == 200

    case(body)


def test_an_engine_that_never_gets_healthy(case: Case) -> None:
    """Its replica is ended when the time is over that the engine may take to be ready, and the request goes to another one."""

    async def body(node: Node) -> None:
        async with node.gateway() as ask:
            node.fault.write_text("hang")
            status, text, seconds = await ask()
            print(f"  the gateway, after {seconds:.2f} s: {status} {text}")
            assert status == 200 and json.loads(text) == node.expected
        assert "was not healthy within" in (node.state.parent / "up.log").read_text()

    case(body)
