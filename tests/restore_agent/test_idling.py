"""Engines that sleep in their pods, and are woken there: real containers, CRIU, threads, and gpumem on the host's memory.

That a real kubelet leaves them alone is shown by tests/e2e; what CUDA does to them, by tests/gpu.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from restore_agent.drivers.cuda import CudaError
from restore_agent.kubernetes.engine_packages import lay_out
from restore_agent.kubernetes.injection import injected
from restore_agent.places.container import Container
from restore_agent.places.processes import is_stopped
from restore_agent.programs.on_kubernetes import pods_served
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.changes import Change
from restore_agent.sequences.idling import CannotSleep, NoRoomToWake, StillUsed
from restore_agent.sequences.node import Node
from restore_agent.sequences.replicas import Origin, Replica, State
from restore_agent.sequences.standby import Rung
from tests.worlds.agent import PORT
from tests.worlds.containers import Running
from tests.worlds.image import PYTHON
from tests.worlds.kubelet import COMMAND, Kubelet
from tests.worlds.pool import Pool
from tests.worlds.published import FOLDER, publishing
from tests.worlds.waiting import until

pytestmark = pytest.mark.usefixtures("needs_criu", "needs_runc")
DOZING = (str(PYTHON), "-u", "-c", (Path(__file__).parents[1] / "worlds/dozing_engine.py").read_text(), str(PORT), "8")
RUNGS = pytest.mark.parametrize("rung", [Rung.PARKED, Rung.STANDBY], ids=lambda rung: rung.value)
TOLD = {
    f"zerowake.dev/{key}": value
    for key, value in {
        "container": "engine",
        "port": str(PORT),
        "health": "/health",
        "model": "small",
        "canary": json.dumps({"path": "/sum"}),
    }.items()
}


@contextlib.asynccontextmanager
async def served(node: Node, kubelet: Kubelet) -> AsyncIterator[None]:
    if kubelet.adjust is None:
        kubelet.adjust = injected(kubelet.placeholder, lay_out(node.store.state), node.weights.socket)
    async with pods_served(node, kubelet.placeholder, kubelet.placeholder.with_name("cri.sock"), kubelet.folder):
        yield


async def capture(kubelet: Kubelet, command: Sequence[str] = DOZING, env: Sequence[str] = ()) -> None:
    async with kubelet.pod("capture", {"zerowake.dev/capture": "small"}, TOLD, command=command, env=env) as pod:
        assert await pod.exit_code() == 0, f"{pod.log()}{kubelet.events()}"


@contextlib.asynccontextmanager
async def restored(node: Node, kubelet: Kubelet, command: Sequence[str] = DOZING, **more: Any) -> AsyncIterator[tuple[Replica, Running]]:
    async with kubelet.pod("one", {"zerowake.dev/snapshot": "small"}, TOLD, command=command, **more) as pod:
        await until(lambda: len(node.replicas), "a replica")
        (found,) = node.replicas
        assert found.origin is Origin.RESTORED, kubelet.events()
        await found.engine.wait_healthy()
        yield found, pod


def first_replica(heard: asyncio.Queue[Change]) -> Replica:
    """Of those that were told of. What is told of snapshots beside them comes whenever they are looked at."""
    return next(each for each in (heard.get_nowait() for _ in range(heard.qsize())) if isinstance(each, Replica))


async def said(of: Replica, path: str) -> Any:
    """By whoever answers at its port."""
    async with of.engine.session() as session:
        answer = await of.engine.ask(session, path)
        return json.loads(answer.body) if answer.body.startswith("{") else answer.body


def processes(of: Replica) -> list[int]:
    return [host for pid, host in of.engine.place.host_pids().items() if pid != 1]


def stands_still(of: Replica) -> bool:
    found = processes(of)
    return bool(found) and all(is_stopped(host) for host in found)


@RUNGS
async def test_an_engine_nobody_asks_sleeps_in_its_pod_and_is_woken_there(node: Node, kubelet: Kubelet, rung: Rung) -> None:
    async with served(node, kubelet):
        await capture(kubelet)
        async with restored(node, kubelet) as (replica, pod):
            before, pids = await said(replica, "/sum"), processes(replica)
            for times in (1, 2):
                with node.changes.heard() as heard:
                    await node.demote(replica.id, 0.0, rung)
                    assert first_replica(heard).id == replica.id, "gateways hear of it before it lets go"
                assert (replica.state, replica.rung, stands_still(replica)) == (State.IDLE, rung, True)
                assert await said(replica, "/health") == "asleep\n", "the kubelet is answered"
                assert stands_still(replica), "and nobody is woken by it"
                await node.demote(replica.id, 0.0, rung)  # another gateway wanted the same
                woken = await node.wake(replica.id, "")
                assert woken is replica and (replica.state, replica.rung) == (State.READY, None)
                assert replica.origin is (Origin.PARKED if rung is Rung.PARKED else Origin.STANDBY)
                assert await said(replica, "/sum") == before
                assert (await said(replica, "/count"))["quiesced"] == times + 1, "once for its snapshot"
            assert processes(replica) == pids, "in the same container"
            assert f"{rung.value}, as nobody asks it" in await kubelet.event("one", "Slept")
            assert "in 0." in await kubelet.event("one", "Woken")
            assert not list((node.store.state / "sleepers").iterdir())
            seconds = dict(replica.phases)
            print(f"{rung.value}: woken in {sum(seconds.values()):.4f} s ({seconds})")
            assert pod.runc.returncode is None


async def test_it_lets_go_of_weights_that_gpumem_lends(node: Node, kubelet: Kubelet, tmp_path: Path) -> None:
    command, env = publishing(str(PYTHON), COMMAND, tmp_path / "weights"), [f"OWN_WEIGHTS={FOLDER}"]
    async with Pool(node.weights.socket) as pool, served(node, kubelet):
        TOLD_LENT = {**TOLD, "zerowake.dev/gpumem": "true"}
        async with kubelet.pod("capture", {"zerowake.dev/capture": "small"}, TOLD_LENT, command=command, env=env) as pod:
            assert await pod.exit_code() == 0, f"{pod.log()}{kubelet.events()}"
        async with kubelet.pod("one", {"zerowake.dev/snapshot": "small"}, TOLD_LENT, command=command, env=env):
            await until(lambda: len(node.replicas), "a replica")
            (replica,) = node.replicas
            before = await said(replica, "/sum")
            for rung in (Rung.PARKED, Rung.STANDBY):
                (region,) = (await pool.status()).regions
                assert region.leases == 1
                await node.demote(replica.id, 0.0, rung)
                assert not any(each.leases for each in (await pool.status()).regions), rung
                await node.wake(replica.id, "")
                assert await said(replica, "/sum") == before, rung


async def test_whoever_asks_it_by_another_way_than_the_gateway_wakes_it(node: Node, kubelet: Kubelet) -> None:
    async with served(node, kubelet):
        await capture(kubelet)
        async with restored(node, kubelet) as (replica, _):
            before = await said(replica, "/sum")
            await node.demote(replica.id, 0.0, Rung.STANDBY)
            answers = await asyncio.gather(*(said(replica, "/sum") for _ in range(5)))
            assert answers == [before] * 5
            assert replica.state is State.READY
            assert (await said(replica, "/count"))["quiesced"] == 2


async def test_one_that_answers_is_left_awake(node: Node, kubelet: Kubelet) -> None:
    async with served(node, kubelet):
        await capture(kubelet)
        async with restored(node, kubelet) as (replica, _):
            stream = asyncio.create_task(said(replica, "/stream?seconds=6"))
            await until(replica.engine.clients)
            with pytest.raises(StillUsed, match=r"a client is connected to replica one\."):
                await node.demote(replica.id, 0.0, Rung.PARKED)
            assert replica.state is State.READY
            assert "a client is connected" in await kubelet.event("one", "StaysAwake")
            asleep = asyncio.create_task(node.demote(replica.id, 0.0, Rung.PARKED))
            await until(lambda: replica.state is State.IDLE)
            await node.wake(replica.id, "")
            with pytest.raises(StillUsed, match="is wanted"):
                await asleep
            assert replica.state is State.READY, "a request had it at once"
            assert (await stream).count("word") == 60
            assert (await said(replica, "/count"))["quiesced"] == 1


async def test_what_cannot_sleep_says_why_and_goes_on(node: Node, kubelet: Kubelet) -> None:
    async with served(node, kubelet):
        await capture(kubelet, COMMAND)
        async with restored(node, kubelet, COMMAND) as (replica, _):
            with pytest.raises(CannotSleep, match="does not take part in the control directory"):
                await node.demote(replica.id, 0.0, Rung.STANDBY)
            assert "does not take part" in await kubelet.event("one", "StaysAwake")
            assert (await said(replica, "/sum"))["digest"] and replica.state is State.READY


async def test_one_whose_probes_nobody_could_answer_stays_awake(node: Node, kubelet: Kubelet) -> None:
    container = {"name": "engine", "livenessProbe": {"grpc": {"port": PORT}}}
    async with served(node, kubelet):
        await capture(kubelet)
        async with restored(node, kubelet, containers=[container]) as (replica, _):
            with pytest.raises(CannotSleep, match="its livenessProbe asks by gRPC"):
                await node.demote(replica.id, 0.0, Rung.PARKED)
            assert replica.state is State.READY


async def test_what_its_pod_s_probes_ask_for_is_answered(node: Node, kubelet: Kubelet) -> None:
    container = {"name": "engine", "livenessProbe": {"httpGet": {"path": "/alive", "port": PORT}}, "readinessProbe": {"exec": {}}}
    async with served(node, kubelet):
        await capture(kubelet)
        async with restored(node, kubelet, containers=[container]) as (replica, _):
            await node.demote(replica.id, 0.0, Rung.PARKED)
            assert await said(replica, "/alive") == "asleep\n"
            assert stands_still(replica)


@RUNGS
async def test_an_agent_that_is_killed_leaves_it_asleep_and_the_next_one_wakes_it(
    node: Node, kubelet: Kubelet, rung: Rung, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing() -> None:
        """As an agent that is killed."""

    async with contextlib.AsyncExitStack() as pods:
        killed = pods.enter_context(monkeypatch.context())
        async with served(node, kubelet):
            await capture(kubelet)
            replica, _ = await pods.enter_async_context(restored(node, kubelet))
            before = await said(replica, "/sum")
            await node.demote(replica.id, 0.0, rung)
            killed.setattr(node.idling, "wake_all", nothing)
            for sleeper in list(node.idling._sleepers.values()):  # what a process has open ends with it
                assert sleeper.doorkeeper
                await sleeper.doorkeeper.close()
            node.idling._sleepers.clear()
        await node.replicas.close()
        killed.undo()
        with node.changes.heard() as heard:
            async with served(node, kubelet):
                await until(lambda: len(node.replicas), "the next agent has it")
                first = first_replica(heard)
                assert (first.state, first.rung) == (State.IDLE, rung), "nobody is sent to it meanwhile"
                assert await said(first, "/health") == "asleep\n"
                await node.wake(first.id, "")
                assert await said(first, "/sum") == before
                assert first.id == replica.id


async def test_an_agent_that_ends_in_order_wakes_it(node: Node, kubelet: Kubelet) -> None:
    async with contextlib.AsyncExitStack() as pods:
        async with served(node, kubelet):
            await capture(kubelet)
            replica, _ = await pods.enter_async_context(restored(node, kubelet))
            before = await said(replica, "/sum")
            await node.demote(replica.id, 0.0, Rung.STANDBY)
        assert not stands_still(replica)
        assert await said(replica, "/sum") == before, "no agent is there, and it serves"
        await node.replicas.close()


async def test_one_that_an_agent_was_killed_over_begins_anew(node: Node, kubelet: Kubelet) -> None:
    async with contextlib.AsyncExitStack() as pods:
        async with served(node, kubelet):
            await capture(kubelet)
            replica, pod = await pods.enter_async_context(restored(node, kubelet))
        await node.replicas.close()
        assert isinstance(replica.engine.place, Container)
        node.idling.notes.moves(replica.id, replica.engine.place.pid)
        async with served(node, kubelet):
            assert "its container begins anew" in await kubelet.event("one", "WakeFailed")
            assert await pod.exit_code() == 1
            assert node.idling.notes.read(replica.id) is None


async def test_one_whose_pod_is_deleted_ends_at_once(node: Node, kubelet: Kubelet) -> None:
    async with served(node, kubelet):
        await capture(kubelet)
        async with restored(node, kubelet) as (replica, pod):
            await node.demote(replica.id, 0.0, Rung.STANDBY)
            await kubelet.delete("one", grace_seconds=60)
            assert await pod.exit_code() == 128 + 15
            await until(lambda: not len(node.replicas))
            assert replica.state is State.GONE and replica not in node.idling


async def test_one_that_is_killed_asleep_is_gone(node: Node, kubelet: Kubelet) -> None:
    async with served(node, kubelet):
        await capture(kubelet)
        async with restored(node, kubelet) as (replica, pod):
            await node.demote(replica.id, 0.0, Rung.STANDBY)
            pod.kill("KILL")
            await until(lambda: not len(node.replicas))
            assert (replica.state, list(node.idling)) == (State.GONE, [])


async def test_one_for_which_there_is_no_memory_sleeps_on(node: Node, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.asynccontextmanager
    async def full(standby: object) -> AsyncIterator[Any]:
        raise CudaError("the GPU is full")
        yield

    async with served(node, kubelet):
        await capture(kubelet)
        async with restored(node, kubelet) as (replica, _):
            before = await said(replica, "/sum")
            await node.demote(replica.id, 0.0, Rung.STANDBY)
            with monkeypatch.context() as patched:
                patched.setattr(node.transitions, "room_for", full)
                with pytest.raises(NoRoomToWake, match=r"sleeps on: the GPU is full"):
                    await node.wake(replica.id, "")
                assert (replica.state, stands_still(replica)) == (State.IDLE, True)
                assert "it sleeps on: the GPU is full" in await kubelet.event("one", "WakeFailed")
                assert await said(replica, "/health") == "asleep\n"
            assert await said(replica, "/sum") == before


async def test_one_that_does_not_wake_is_gone_and_its_container_begins_anew(
    node: Node, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object) -> None:
        raise CudaError("it is stranded")

    async with served(node, kubelet):
        await capture(kubelet)
        async with restored(node, kubelet) as (replica, pod):
            await node.demote(replica.id, 0.0, Rung.STANDBY)
            monkeypatch.setattr(node.transitions, "_resume", fails)
            with pytest.raises(RestoreFailed, match="it is stranded"):
                await node.wake(replica.id, "")
            assert "its container begins anew: " in await kubelet.event("one", "WakeFailed")
            assert await pod.exit_code() == 128 + 9
            await until(lambda: not len(node.replicas))
            assert replica.state is State.GONE


async def test_others_that_need_its_gpu_make_a_standby_of_a_parked_one(node: Node, kubelet: Kubelet) -> None:
    async with served(node, kubelet):
        await capture(kubelet)
        async with restored(node, kubelet) as (replica, _):
            before = await said(replica, "/sum")
            await node.demote(replica.id, 0.0, Rung.PARKED)
            (standby,) = node.idling
            standby.gpus = {"GPU-1": 1 << 30}
            assert node.rungs.held() == {"GPU-1": 1 << 30}
            await node.rungs.others_have({"GPU-2"})
            assert replica.rung is Rung.PARKED
            await node.rungs.others_have({"GPU-1"})
            assert (replica.state, replica.rung, stands_still(replica)) == (State.IDLE, Rung.STANDBY, True)
            assert node.rungs.held() == {}
            assert await said(replica, "/sum") == before
