"""`zerowake serve` with the real KEDA: a backlog worth four replicas brings four at once, and KEDA and the HPA go on from there; without
KEDA there is one all the same; a model's name in two namespaces scales one of them; and a list in Redis brings replicas, too, as does what
another gateway tells.

Two replicas of it run on this machine: requests come to one, KEDA speaks to the other. Pods are plain web servers, and no agent runs: where
nothing says that they are there, the requests stay held.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.api import Api, ApiError, Object, condition
from tests.e2e.chart import definition, run
from tests.e2e.cluster.control import tell
from tests.e2e.cluster.layout import Addresses
from tests.e2e.plain_model import COOLDOWN_SECONDS, NAME, PORT, deployment, replicas_of, scaled_object
from tests.e2e.release import own_namespace
from tests.e2e.serving import scaler
from tests.worlds.alerting import alerting
from tests.worlds.redis_server import redis_server

pytestmark = pytest.mark.own_cluster("has KEDA call a scaler on this machine")

TIMES = 5
HPA_SYNC_SECONDS = 15


async def timeline(api: Api, namespace: str) -> AsyncIterator[tuple[float, int]]:
    """When the Deployment's number of replicas changed."""
    last = -1
    async for _, one in api.watch("Deployment", namespace):
        if (now := replicas_of(one)) != last:
            last = now
            yield time.monotonic(), now


async def test_a_backlog_brings_its_replicas_at_once(
    api: Api, namespace: str, addresses: Addresses, kubeconfig: str, tmp_path: Path
) -> None:
    async with (
        definition(api, kubeconfig),  # a scaler is not ready before it has seen every ModelSnapshot
        scaler(tmp_path, namespace, kubeconfig, addresses.machine) as zerowake,
        asyncio.timeout(240),
    ):
        await api.apply(deployment(NAME), scaled_object(NAME, zerowake.keda, most=10, target=8), namespace=namespace)
        await api.until("ScaledObject", namespace, NAME, lambda one: condition(one, "Ready") and _activity(one))
        first, four = [], []
        for run in range(TIMES):
            await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 0)
            await asyncio.sleep(3)  # KEDA opens a stream that ended after 2 s
            changes = timeline(api, namespace)
            assert (await anext(changes))[1] == 0
            began = time.monotonic()
            asked = zerowake.ask(32)
            seen = []
            async for at, replicas in changes:
                seen.append((round(1000 * (at - began)), replicas))
                if replicas == 1 and len(seen) == 1:
                    first.append(at - began)
                if replicas == 4:
                    four.append(at - began)
                    break
            print(f"run {run}: {seen} (ms, replicas)")
            if run == TIMES - 1:  # the HPA has looked, and finds what it would have set
                await api.until("HorizontalPodAutoscaler", namespace, f"keda-hpa-{NAME}", _has_looked, within=2 * HPA_SYNC_SECONDS + 5)
                assert replicas_of(await api.get("Deployment", namespace, NAME)) == 4
            for each in asked:
                each.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        one, all_four = (1000 * statistics.median(each) for each in (first, four))
        print(f"first request → 1: {one:.0f} ms, → 4: {all_four:.0f} ms (medians of {TIMES}; the longest {1000 * max(four):.0f} ms)")
        assert max(four) < 1
        await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 0)  # KEDA takes all of them away again


async def test_keda_is_gone_when_the_first_request_comes(
    api: Api, namespace: str, addresses: Addresses, kubeconfig: str, tmp_path: Path
) -> None:
    async with (
        definition(api, kubeconfig),
        scaler(tmp_path, namespace, kubeconfig, addresses.machine) as zerowake,
        alerting(tmp_path / "prometheus", *zerowake.pages) as alerts,
        asyncio.timeout(240),
    ):
        await api.apply(lease(), snapshot(), labelled(), scaled_object(NAME, zerowake.keda), namespace=namespace)
        await api.until("ScaledObject", namespace, NAME, lambda one: condition(one, "Ready") and _activity(one))
        await alerts.is_quiet("ZerowakeKedaNotConnected")
        await asyncio.to_thread(tell, "stop", "keda-operator")
        try:
            began = time.monotonic()
            asked = zerowake.get()
            await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 1, within=20)
            print(f"scaled without KEDA after {time.monotonic() - began:.2f} s")
            assert await asked == 200
            print(f"answered without KEDA after {time.monotonic() - began:.2f} s")
            await alerts.fires("ZerowakeScaledWithoutKeda", model=NAME)
            await alerts.fires("ZerowakeKedaNotConnected")
        finally:
            await asyncio.to_thread(tell, "start", "keda-operator")
            await gone(api, ("ModelSnapshot", namespace))
        assert "ScaledWithoutKeda" in {each["reason"] for each in await api.list("Event", namespace)}
        await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 0, within=120)  # it is KEDA's again
        await alerts.is_quiet("ZerowakeKedaNotConnected")


async def test_a_pod_that_loads_stays_though_whoever_asked_has_left(
    api: Api, namespace: str, addresses: Addresses, kubeconfig: str, tmp_path: Path
) -> None:
    """It takes ten times KEDA's cooldown to be ready."""
    slow = labelled()
    slow["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["initialDelaySeconds"] = 10 * COOLDOWN_SECONDS
    async with (
        definition(api, kubeconfig),
        scaler(tmp_path, namespace, kubeconfig, addresses.machine) as zerowake,
        asyncio.timeout(240),
    ):
        await api.apply(lease(), snapshot(), slow, scaled_object(NAME, zerowake.keda), namespace=namespace)
        try:
            await api.until("ScaledObject", namespace, NAME, lambda one: condition(one, "Ready") and _activity(one))
            changes = timeline(api, namespace)
            assert (await anext(changes))[1] == 0
            asked = zerowake.get()
            began, replicas = await anext(changes)
            assert replicas == 1
            asked.cancel()
            while not (pods := await api.list("Pod", namespace)):
                await asyncio.sleep(0.05)
            ready = asyncio.create_task(
                api.until("Pod", namespace, pods[0]["metadata"]["name"], lambda one: condition(one, "Ready"), within=60)
            )
            away = asyncio.ensure_future(anext(changes))
            await asyncio.wait([ready, away], return_when=asyncio.FIRST_COMPLETED)
            assert ready.done() and not away.done(), "its replica was taken away before it served"
            print(f"ready after {time.monotonic() - began:.1f} s, of which nobody has waited for the most")
            assert (await away)[1] == 0, "once it is ready the cooldown counts"
        finally:
            await gone(api, ("ModelSnapshot", namespace))


async def test_a_models_name_in_two_namespaces(api: Api, namespace: str, addresses: Addresses, kubeconfig: str, tmp_path: Path) -> None:
    async with (
        definition(api, kubeconfig),
        own_namespace(api, "other") as other,
        scaler(tmp_path, namespace, kubeconfig, addresses.machine) as zerowake,
        asyncio.timeout(240),
    ):
        await api.apply(lease(), snapshot(), labelled(), scaled_object(NAME, zerowake.keda), namespace=namespace)
        await api.until("ScaledObject", namespace, NAME, lambda one: condition(one, "Ready") and _activity(one))
        await asyncio.sleep(1)  # ages are whole seconds: of two objects of one second either may count as the older
        await api.apply(labelled(), scaled_object(NAME, zerowake.keda), namespace=other)
        await api.until("ScaledObject", other, NAME, lambda one: condition(one, "Ready") and _activity(one))
        theirs: list[int] = []

        async def follow() -> None:
            async for _, replicas in timeline(api, other):
                theirs.append(replicas)

        following = asyncio.create_task(follow())
        try:
            assert await zerowake.get() == 200
            await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 1)
            await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 0)  # several polls later
            assert theirs == [0]
            async for _, event in api.watch("Event", other):
                if event["reason"] == "ModelNameTaken":
                    assert f"namespace {namespace}'s already" in event["message"]
                    break
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await gone(api, ("ScaledObject", other), ("ModelSnapshot", namespace))


async def test_a_list_in_redis_scales_from_zero_and_back(
    api: Api, namespace: str, addresses: Addresses, kubeconfig: str, tmp_path: Path
) -> None:
    """A Redis behind a Service of the model's namespace, past the gateway; and a source that the namespace may not have."""
    with redis_server(tmp_path, host=addresses.machine) as redis:
        async with (
            definition(api, kubeconfig),
            scaler(tmp_path, namespace, kubeconfig, addresses.machine) as zerowake,
            asyncio.timeout(180),
        ):
            source = {"type": "redis", "url": f"redis://queue.{namespace}.svc:{redis.port}", "list": "jobs"}
            await api.apply(lease(), *service("queue", addresses.machine, redis.port), snapshot([source]), labelled(), namespace=namespace)
            await api.apply(scaled_object(NAME, zerowake.keda), namespace=namespace)
            try:
                await api.until("ScaledObject", namespace, NAME, lambda one: condition(one, "Ready") and _activity(one))
                await api.until("ModelSnapshot", namespace, NAME, lambda one: _sources(one)[:2] == ("True", "Heard"))
                assert replicas_of(await api.get("Deployment", namespace, NAME)) == 0
                began = time.monotonic()
                redis.do("rpush", "jobs", "a")
                await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 1)
                print(f"scaled for a list's first element after {time.monotonic() - began:.2f} s")
                redis.do("del", "jobs")
                await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 0)
                await api.apply(snapshot([source, {**source, "url": "redis://10.0.0.1"}]), namespace=namespace)
                refused = await api.until("ModelSnapshot", namespace, NAME, lambda one: _sources(one)[:2] == ("False", "Refused"))
                assert _sources(refused)[2].startswith("spec.sources[1].url: 10.0.0.1 is no Service of this namespace: name one, as in")
                async for _, event in api.watch("Event", namespace):
                    if event["reason"] == "SourceRefused":
                        break
                with pytest.raises(ApiError, match="Unsupported value"):
                    await api.apply(snapshot([{"type": "rabbitmq"}]), namespace=namespace)
            finally:
                await gone(api, ("ModelSnapshot", namespace))


async def test_what_another_gateway_tells_scales_from_zero_and_back(
    api: Api, namespace: str, addresses: Addresses, kubeconfig: str, tmp_path: Path
) -> None:
    """With a token of the model's namespace: one replica is told, and KEDA asks the other."""
    async with (
        definition(api, kubeconfig),
        own_namespace(api, "other") as other,
        scaler(tmp_path, namespace, kubeconfig, addresses.machine) as zerowake,
        asyncio.timeout(180),
    ):
        await api.apply(lease(), snapshot([{"type": "push"}]), labelled(), scaled_object(NAME, zerowake.keda), namespace=namespace)
        try:
            await api.until("ScaledObject", namespace, NAME, lambda one: condition(one, "Ready") and _activity(one))
            await api.until("ModelSnapshot", namespace, NAME, lambda one: _sources(one)[:2] == ("Unknown", "Asked"))

            def token(of: str, audience: str = "zerowake") -> str:
                return run(kubeconfig, "kubectl", "-n", of, "create", "token", "default", f"--audience={audience}").strip()

            assert await zerowake.post(1, token(namespace, "another")) == 401
            assert await zerowake.post(1, token(other)) == 404
            assert replicas_of(await api.get("Deployment", namespace, NAME)) == 0
            assert await zerowake.post(1, token(namespace)) == 204
            await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 1)
            assert await zerowake.post(0, token(namespace)) == 204
            await api.until("Deployment", namespace, NAME, lambda one: replicas_of(one) == 0)
        finally:
            await gone(api, ("ModelSnapshot", namespace))


async def gone(api: Api, *objects: tuple[str, str]) -> None:
    """While there is somebody who takes off their finalizers."""
    for kind, namespace in objects:
        await api.delete(kind, namespace, NAME)
        await api.until(kind, namespace, NAME, lambda one: one is None)


def labelled() -> Object:
    """A Deployment whose pods are a ModelSnapshot's."""
    made = deployment(NAME)
    made["spec"]["template"]["metadata"]["labels"]["zerowake.dev/snapshot"] = NAME
    return made


def snapshot(sources: Sequence[Object] = ()) -> Object:
    """Of which nothing is captured, since no agent runs."""
    template = {"spec": deployment(NAME)["spec"]["template"]["spec"]}
    kind = {"apiVersion": "zerowake.dev/v1alpha1", "kind": "ModelSnapshot"}
    return {**kind, "metadata": {"name": NAME}, "spec": {"port": PORT, "template": template, "sources": list(sources)}}


def service(name: str, address: str, port: int) -> list[Object]:
    """Of a program that is no pod."""
    made = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"ports": [{"port": port}]}}
    labels = {"kubernetes.io/service-name": name}
    behind = {"addressType": "IPv4", "endpoints": [{"addresses": [address]}], "ports": [{"port": port}]}
    return [made, {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": name, "labels": labels}, **behind}]


def lease() -> Object:
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "zerowake-controller"}}


def _sources(one: Object | None) -> tuple[str, str, str]:
    """What the condition says."""
    conditions = ((one or {}).get("status") or {}).get("conditions", [])
    return next(
        ((each["status"], each["reason"], each.get("message", "")) for each in conditions if each["type"] == "Sources"), ("", "", "")
    )


def _activity(one: Object | None) -> object:
    return ((one or {}).get("status") or {}).get("externalMetricNames")


def _has_looked(one: Object | None) -> bool:
    status = (one or {}).get("status") or {}
    return bool(status.get("currentReplicas") == 4 and status.get("desiredReplicas") == 4 and condition(one, "ScalingActive"))
