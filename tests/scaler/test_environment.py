"""A template's environment that is another one in the next pod: refused, allowed, told; and what stands behind it as its part."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from scaler.kubernetes import environment
from scaler.kubernetes.capture_pod import refusal
from scaler.kubernetes.resources import REPORTER, Metadata, ModelSnapshot, Spec
from tests.worlds.kubernetes_api import Api
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.errors import ClusterError

IP = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
URL = {"name": "URL", "value": "http://$(POD_IP):8000"}
NODE = {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
HASH = {"name": "HASH", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['pod-template-hash']"}}}
TEAM = {"name": "TEAM", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['team']"}}}
KEY = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "api"}}}


def snapshot(*env: dict[str, Any], allowed: bool = False, **more: Any) -> ModelSnapshot:
    sources = [{"configMapRef": {"name": "settings"}}] if more.pop("all_of_settings", False) else []
    engine = {"name": "engine", "image": "engine:1", "env": list(env), "envFrom": sources}
    template = {"metadata": {"labels": {"team": "a"}}, "spec": {"containers": [engine], **more}}
    return ModelSnapshot(Metadata("chat", "tenant"), Spec(template=template, stale_environment="allowed" if allowed else ""))


def test_a_template_that_asks_for_its_own_pod_is_refused_unless_old_values_are_allowed() -> None:
    why = refusal(snapshot(NODE, IP, URL))
    assert "POD_IP (status.podIP), URL (status.podIP)" in why
    assert "spec.staleEnvironment: allowed" in why
    assert "pod-template-hash" in refusal(snapshot(HASH))
    assert not refusal(snapshot(NODE, TEAM, KEY)), "its node, and what all its pods have, are the same in the next one"
    assert not refusal(snapshot(NODE, IP, URL, HASH, allowed=True))


def test_a_condition_says_what_is_old() -> None:
    said = environment.condition(snapshot(IP, allowed=True))
    assert (said.type, said.status, said.reason) == ("StaleEnvironment", "True", "Allowed")
    assert "POD_IP (status.podIP), HOSTNAME, the addresses of the namespace's Services" in said.message
    said = environment.condition(snapshot())
    assert (said.status, said.reason, said.message) == (
        "True",
        "Implicit",
        "restored engines keep the capture pod's HOSTNAME, the addresses of the namespace's Services",
    )
    assert environment.condition(snapshot(hostname="engine", enableServiceLinks=False)).status == "False"


@pytest.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Api, Cluster]]:
    api = Api()
    async with api.connected(tmp_path, monkeypatch, REPORTER) as cluster:
        yield api, cluster


async def put(world: Api, plural: str, name: str, **data: str) -> None:
    found = world.get(plural, "tenant", name)
    metadata = {"name": name, "namespace": "tenant"}
    if found:
        await world.change(plural, "tenant", name, {"data": data})
    else:
        await world.put(plural, {"metadata": metadata, "data": data})


async def test_what_config_maps_and_secrets_hold_is_part_of_the_template(api: tuple[Api, Cluster]) -> None:
    world, cluster = api
    wanted = snapshot(KEY, all_of_settings=True)
    seen = [await environment.contents(cluster, wanted)]  # none of them is there yet
    await put(world, "secrets", "keys", api="b25l", other="eA==")
    seen.append(await environment.contents(cluster, wanted))
    await put(world, "secrets", "keys", api="b25l", other="eQ==")
    assert await environment.contents(cluster, wanted) == seen[-1], "a key that it does not take"
    await put(world, "secrets", "keys", api="dHdv")
    seen.append(await environment.contents(cluster, wanted))
    await put(world, "configmaps", "settings", level="1")
    seen.append(await environment.contents(cluster, wanted))
    await put(world, "configmaps", "settings", level="1", more="2")
    seen.append(await environment.contents(cluster, wanted))
    assert len(set(seen)) == len(seen)
    assert await environment.contents(cluster, snapshot(IP)) == ""


async def test_without_the_right_to_read_them_it_is_said(api: tuple[Api, Cluster]) -> None:
    world, cluster = api
    world.refuse.append(("GET", "secrets", 403, "secrets is forbidden"))
    with pytest.raises(ClusterError) as refused:
        await environment.contents(cluster, snapshot(KEY))
    assert "a change of them is not noticed" in environment.unreadable(refused.value)
