"""`zerowake serve` as processes: two replicas of it, an API server, an agent and KEDA's client, over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml
from zerowake_proto import agent_pb2

from tests.worlds.controlled import TEMPLATE
from tests.worlds.echo_engine import Engine
from tests.worlds.fake_agent import Agent
from tests.worlds.keda_client import Keda, ref
from tests.worlds.kubernetes_api import Api
from tests.worlds.ports import free_port
from tests.worlds.redis_server import redis_server
from tests.worlds.scalers import ADDRESSES, TRIGGER, Replica, World, endpoint_slice, free_ports, serving, world
from tests.worlds.waiting import until
from zerowake_shared.pod_contract import replica_id


async def declare(made: World) -> None:
    """A ScaledObject as KEDA leaves it behind, its target at zero; no ModelSnapshot."""
    await made.api.put("deployments", {"metadata": {"name": "engine", "namespace": "tenant"}, "spec": {"replicas": 0}})
    await made.api.put(
        "scaledobjects",
        {
            "metadata": {"name": "m-object", "namespace": "tenant", "creationTimestamp": "2026-11-22T06:00:00Z"},
            "spec": {"scaleTargetRef": {"name": "engine"}, "maxReplicaCount": 10, "triggers": [TRIGGER]},
            "status": {"scaleTargetGVKR": {"group": "apps", "version": "v1", "kind": "Deployment", "resource": "deployments"}},
        },
    )
    for each in made.replicas:
        await each.reads("metrics", 'zerowake_held_requests{model="m"} 0.0')
        await each.reads("metrics", "zerowake_forecast_worth_it 0.0")
        await each.reads("metrics", "zerowake_ahead_active 0.0")
        await each.reads("", "page/page.js")


async def test_from_zero_with_keda_at_another_replica(tmp_path: Path) -> None:
    """A model that only a trigger declares; the push, the number and the answer are those of all replicas."""
    async with world(tmp_path) as made, Engine() as engine, Engine() as hostile:
        here, other = made.replicas
        await declare(made)
        async with Keda(other.keda) as keda:
            watched = keda.watch(ref("m", "tenant"))
            await watched.specs.get()
            asked = [here.ask(f"n{number}") for number in range(32)]
            await watched.true()
            await here.held(32)
            async with asyncio.timeout(5):
                while await keda.poll(ref("m", "tenant")) != (32.0, True):
                    await asyncio.sleep(0.005)
            await made.api.change("deployments", "tenant", "engine", {"spec": {"replicas": 1}})  # as KEDA does
            async with asyncio.timeout(5):
                while made.api.get("deployments", "tenant", "engine")["spec"]["replicas"] != 4:  # type: ignore[index]
                    await asyncio.sleep(0.005)
            made.node.runs(hostile, "r0", namespace="somebody")  # a pod that says it were the model's
            made.node.runs(engine)
            answers = await asyncio.gather(*asked)
            assert [status for status, _, _ in answers] == [200] * 32
            assert hostile.seen.empty()
            assert (await other.ask())[0] == 200  # it knows the replica as well
            await here.reads("metrics", 'zerowake_activation_phase_seconds_count{model="m",phase="pushed"} 1.0')


async def test_from_zero_without_any_keda(tmp_path: Path) -> None:
    async with world(tmp_path) as made, Engine() as engine:
        here, other = made.replicas
        await declare(made)
        asked = [here.ask(), other.ask()]
        async with asyncio.timeout(20):
            while made.api.get("deployments", "tenant", "engine")["spec"]["replicas"] != 1:  # type: ignore[index]
                await asyncio.sleep(0.02)
        made.node.runs(engine)
        assert [status for status, _, _ in await asyncio.gather(*asked)] == [200, 200]
        (event,) = [each for each in made.api.all("events") if each["reason"] == "ScaledWithoutKeda"]
        assert (event["regarding"]["kind"], event["regarding"]["name"]) == ("ScaledObject", "m-object")


async def test_another_namespaces_trigger(tmp_path: Path) -> None:
    """Requests for the model are the owner's alone; the other is told so, by an event of its object."""
    async with world(tmp_path) as made:
        here, other = made.replicas
        await declare(made)
        foreign = made.api.get("scaledobjects", "tenant", "m-object")
        assert foreign
        metadata = {"name": "m-object", "namespace": "other", "creationTimestamp": "2026-11-22T07:00:00Z"}
        await made.api.put("scaledobjects", {**foreign, "metadata": metadata})
        async with Keda(other.keda) as keda:
            asked = here.ask()
            async with asyncio.timeout(10):
                while await keda.poll(ref("m", "tenant")) != (1.0, True):
                    await asyncio.sleep(0.005)
                assert await keda.poll(ref("m", "other")) == (0.0, False)
                while not [each for each in made.api.all("events") if each["reason"] == "ModelNameTaken"]:
                    await asyncio.sleep(0.02)
            asked.cancel()
        (event,) = [each for each in made.api.all("events") if each["reason"] == "ModelNameTaken"]
        assert event["metadata"]["namespace"] == "other"


async def test_a_rolled_replica_answers_what_it_holds(tmp_path: Path) -> None:
    async with world(tmp_path) as made, Engine() as engine:
        here, other = made.replicas
        await declare(made)
        async with Keda(here.keda) as left, Keda(other.keda) as keda:
            leaving = left.watch(ref("m", "tenant"))
            await leaving.specs.get()
            asked = here.ask()
            await here.held(1)
            stopping = asyncio.create_task(here.stop())
            async with asyncio.timeout(10):
                assert await leaving.ends.get() is None  # with OK: KEDA comes back after two seconds, at another replica
            await here.reads("readyz", "draining")
            late = here.ask("late")  # somebody who has not heard yet
            await here.held(2)
            async with asyncio.timeout(5):
                while await keda.poll(ref("m", "tenant")) != (2.0, True):
                    await asyncio.sleep(0.005)
            made.node.runs(engine)
            for status, _, headers in (await asked, await late):
                assert (status, headers["Connection"]) == (200, "close")
            assert await stopping == 0
            async with asyncio.timeout(5):
                while await keda.poll(ref("m", "tenant")) != (0.0, False):
                    await asyncio.sleep(0.005)


async def test_what_is_still_held_at_the_end_is_handed_back(tmp_path: Path) -> None:
    async with world(tmp_path, drain_seconds=0.5, replicas=1) as made:
        (here,) = made.replicas
        await declare(made)
        asked = here.ask()
        await here.held(1)
        assert await here.stop() == 0
        status, body, headers = await asked
        assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "no_replica", "5")


async def test_a_killed_replica_is_not_counted_for_long(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        here, other = made.replicas
        await declare(made)
        async with Keda(other.keda) as keda:
            asked = here.ask()
            async with asyncio.timeout(10):
                while await keda.poll(ref("m", "tenant")) != (1.0, True):
                    await asyncio.sleep(0.005)
                here.process.kill()
                while await keda.poll(ref("m", "tenant")) != (0.0, False):
                    await asyncio.sleep(0.02)
            await asyncio.gather(asked, return_exceptions=True)


async def test_not_ready_before_it_knows_the_models(tmp_path: Path) -> None:
    api = Api()
    api.refuse = [("GET", "scaledobjects", 404, "the server could not find the requested resource")] * 50
    ports = free_ports("listen", "metrics", "keda")
    config = {
        "namespace": "zerowake",
        "listen": f"127.0.0.1:{ports['listen']}",
        "metrics": f"127.0.0.1:{ports['metrics']}",
        "keda": {"listen": f"127.0.0.1:{ports['keda']}"},
        "agents": {"addresses": ["127.0.0.1:1"]},
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    async with (
        api.serve(tmp_path) as kubeconfig,
        aiohttp.ClientSession() as client,
        serving(tmp_path / "serve.yaml", kubeconfig, "127.0.0.1", ports, client) as replica,
    ):
        await replica.reads("readyz", "not ready: ScaledObjects could not be listed so far")
        api.refuse.clear()
        await replica.reads("readyz", "ok")


def _pod(engine: Engine, ready: bool = True, **metadata: str) -> dict[str, Any]:
    status = {"type": "Ready", "status": str(ready), "lastTransitionTime": "2026-11-26T18:01:00Z"}
    running = {
        "name": "engine",
        "containerID": "containerd://0123456789abcdef",
        "state": {"running": {"startedAt": "2026-11-26T18:00:00Z"}},
    }
    probe = {"httpGet": {"path": "/health", "port": engine.port}}
    return {
        "metadata": {"name": "p", "namespace": "tenant", "labels": {"zerowake.dev/snapshot": "m"}, **metadata},
        "spec": {"nodeName": "n1", "containers": [{"name": "engine", "readinessProbe": probe}]},
        "status": {"podIP": "127.0.0.1", "conditions": [status], "containerStatuses": [running]},
    }


async def test_a_ready_pod_is_served_whether_its_node_has_an_agent_or_not(tmp_path: Path) -> None:
    async with world(tmp_path) as made, Engine() as engine:
        await declare(made)
        await made.api.put("endpointslices", endpoint_slice("zerowake-agent"))
        asked = [each.ask() for each in made.replicas]
        for each in made.replicas:
            await each.held(1)
        await made.api.put("pods", _pod(engine))
        assert [status for status, _, _ in await asyncio.gather(*asked)] == [200, 200]
        await made.api.put("pods", _pod(engine, ready=False))  # it answers, but does not want to be asked
        asked = [await _held(each) for each in made.replicas]
        made.node.runs(engine, replica_id("p", "0123456789abcdef"))  # its agent comes
        await made.api.put("endpointslices", endpoint_slice("zerowake-agent", "127.0.0.1"))
        await made.api.put("pods", _pod(engine))
        assert [status for status, _, _ in await asyncio.gather(*asked)] == [200, 200]
        for each in made.replicas:
            await each.reads("metrics", 'zerowake_replicas{model="m"} 1.0')


async def _held(replica: Replica) -> asyncio.Task[Any]:
    """Asks until a request is held: nobody tells when a replica has heard of a pod that is not ready any more."""
    while True:
        asked = replica.ask()
        done, _ = await asyncio.wait([asked], timeout=0.5)
        if not done:
            return asked


async def _declare_one_at_a_time(made: World) -> None:
    await declare(made)
    metadata = {"name": "m", "namespace": "tenant", "creationTimestamp": "2026-11-22T05:00:00Z"}
    await made.api.put("modelsnapshots", {"metadata": metadata, "spec": {"limits": {"concurrency": 1}}})


async def test_a_replicas_places_are_those_of_all_gateways(tmp_path: Path) -> None:
    async with world(tmp_path) as made, Engine(held=True) as engine:
        await _declare_one_at_a_time(made)
        made.node.runs(engine)
        asked = [each.ask(f"{number} {each.keda}") for number in range(10) for each in made.replicas]
        async with asyncio.timeout(10):
            order = [(await engine.seen.get()).split()[-1]]
        for each in made.replicas:  # a gateway that has read its requests later would have its turns later
            await each.held(9 if each.keda == order[0] else 10)
        engine.say()
        for _ in asked[1:]:
            async with asyncio.timeout(10):
                order.append((await engine.seen.get()).split()[-1])
            engine.say()
        assert [status for status, _, _ in await asyncio.gather(*asked)] == [200] * 20
        assert engine.most == 1
        assert all(order[number] != order[number + 1] for number in range(2, 17)), order


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("first", [0, 1])
async def test_a_gateway_that_ends_or_hangs_does_not_keep_a_place_for_ever(tmp_path: Path, kind: signal.Signals, first: int) -> None:
    async with world(tmp_path) as made, Engine(held=True) as engine:
        await _declare_one_at_a_time(made)
        made.node.runs(engine)
        going, staying = made.replicas[first], made.replicas[1 - first]
        its = going.ask("its")
        async with asyncio.timeout(10):
            await engine.seen.get()
        asked = staying.ask("asked")
        await staying.held(1)
        going.process.send_signal(kind)
        if kind is signal.SIGSTOP:  # its connections stand, so that it may live: until it is not listed any more
            address = ADDRESSES[1 - first]
            await made.api.put("endpointslices", endpoint_slice("zerowake-peers", address))
        async with asyncio.timeout(20):
            assert "asked" in await engine.seen.get()
        engine.say(100)
        assert (await asked)[0] == 200
        its.cancel()
        await asyncio.gather(its, return_exceptions=True)


async def test_a_pin_in_a_model_snapshot_is_told_to_its_nodes_and_taken_back(tmp_path: Path) -> None:
    api, agent = Api(), Agent("n1")
    agent.has("tenant", "m", "d" * 64)
    ports = free_ports("listen", "metrics", "keda")

    async def wish(**pin: str) -> None:
        artifact = {"name": "m", "digest": "d" * 64}
        metadata = {"name": "m", "namespace": "tenant", "uid": "1", "creationTimestamp": "2026-11-22T06:00:00Z"}
        await api.put("modelsnapshots", {"metadata": metadata, "spec": {"artifact": artifact, **pin}})

    async with agent.serve() as address, api.serve(tmp_path) as kubeconfig, aiohttp.ClientSession() as client:
        config = {
            "namespace": "zerowake",
            "listen": f"127.0.0.1:{ports['listen']}",
            "metrics": f"127.0.0.1:{ports['metrics']}",
            "keda": {"listen": f"127.0.0.1:{ports['keda']}"},
            "agents": {"addresses": [address]},
        }
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
        async with serving(tmp_path / "serve.yaml", kubeconfig, "127.0.0.1", ports, client) as replica:
            await replica.reads("readyz", "ok")
            for pin, rung in (
                ({"pin": "memory"}, agent_pb2.RUNG_MEMORY),
                ({"pin": "disk"}, agent_pb2.RUNG_DISK),
                ({}, agent_pb2.RUNG_ABSENT),
            ):
                await wish(**pin)
                await until(lambda rung=rung: agent.pinned and agent.pinned[-1].rung == rung, f"{pin} is told")


async def _declare_a_list(made: World, url: str) -> None:
    await _declare_source(made, {"type": "redis", "url": url, "list": "jobs", "interval_seconds": 0.1})


async def _declare_source(made: World, source: dict[str, Any]) -> None:
    await declare(made)
    metadata = {"name": "m", "namespace": "tenant", "creationTimestamp": "2026-11-22T05:00:00Z"}
    await made.api.put("modelsnapshots", {"metadata": metadata, "spec": {"template": TEMPLATE, "sources": [source]}})


async def _polled(keda: Keda, expected: tuple[float, bool]) -> None:
    """Waits until KEDA is answered so."""
    found: object = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(60):
            while found != expected:
                try:
                    found = await keda.poll(ref("m", "tenant"))
                except grpc.aio.AioRpcError as error:
                    found = error.details()
                await asyncio.sleep(0.01)
    assert found == expected


async def test_a_list_in_redis_counts_once_and_whoever_asks_it_may_die(tmp_path: Path) -> None:
    """At a Service of the model's namespace. Each replica asks for itself, so that there is nothing to hand over."""
    with redis_server(tmp_path) as redis:
        redis.do("rpush", "jobs", *"abc")
        async with world(tmp_path) as made:
            await made.api.put("services", {"metadata": {"name": "queue", "namespace": "tenant"}, "spec": {"clusterIP": "127.0.0.1"}})
            here, other = made.replicas
            await _declare_a_list(made, f"redis://queue.tenant.svc:{redis.port}/0")
            async with Keda(here.keda) as first, Keda(other.keda) as keda:
                await _polled(first, (3.0, True))
                await _polled(keda, (3.0, True))
                asked = here.ask()
                await _polled(keda, (4.0, True))
                here.process.kill()
                await _polled(keda, (3.0, True))  # the request went with its gateway
                await asyncio.gather(asked, return_exceptions=True)
                redis.do("del", "jobs")
                await _polled(keda, (0.0, False))
                await other.reads("metrics", 'zerowake_source_up{model="m",source="redis"} 1.0')


async def test_a_source_that_is_silent_is_no_zero_and_is_said(tmp_path: Path) -> None:
    port = free_port()
    async with world(tmp_path) as made, Engine() as engine:
        here, other = made.replicas
        await _declare_a_list(made, f"redis://127.0.0.1:{port}")
        made.node.runs(engine)
        for each in made.replicas:
            await each.reads("metrics", 'zerowake_source_up{model="m",source="redis"} 0.0')
            await each.reads("metrics", 'zerowake_replicas{model="m"} 1.0')
        async with Keda(other.keda) as keda:
            with pytest.raises(grpc.aio.AioRpcError, match="source redis of model m"):
                await keda.poll(ref("m", "tenant"))
            assert (await here.ask())[0] == 200, "requests are served as ever"

            def condition() -> tuple[str, str]:
                found = made.api.get("modelsnapshots", "tenant", "m") or {}
                conditions = (found.get("status") or {}).get("conditions", [])
                return next(((each["status"], each["reason"]) for each in conditions if each["type"] == "Sources"), ("", ""))

            await until(lambda: condition() == ("False", "Silent"), "the condition says that it is silent")
            with redis_server(tmp_path, port=port) as redis:
                redis.do("rpush", "jobs", "a")
                await _polled(keda, (1.0, True))
                await until(lambda: condition() == ("True", "Heard"), "the condition says that it is heard")


async def test_what_is_posted_at_one_replica_counts_once_at_each_and_after_its_end(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        here, other = made.replicas
        made.api.tokens = {"a.b.c": "system:serviceaccount:tenant:default", "d.e.f": "system:serviceaccount:hostile:default"}
        await _declare_source(made, {"type": "push", "by": "b"})
        for each in made.replicas:
            await each.reads("metrics", 'zerowake_source_up{model="m",source="push"} 0.0')
        told = {"model": "m", "by": "b", "pending": 7}
        assert (await here.post(told, "d.e.f"))[0] == 404, "the model is another namespace's"
        assert await here.post(told, "a.b.c") == (204, "")
        async with Keda(here.keda) as first, Keda(other.keda) as keda:
            await _polled(first, (7.0, True))
            await _polled(keda, (7.0, True))
            assert (await other.post({**told, "pending": 3}, "a.b.c"))[0] == 204
            await _polled(first, (3.0, True))
            other.process.kill()
            await other.process.wait()
            assert await first.poll(ref("m", "tenant")) == (3.0, True), "it is known where it was not posted, too"
