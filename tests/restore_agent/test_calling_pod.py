"""What a pod asks for by its labels and annotations, and whether it may have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from restore_agent.kubernetes.calling_pod import CallingPod, Refused, engine_container
from restore_agent.kubernetes.cri import Described
from restore_agent.kubernetes.pod import Pod
from restore_agent.snapshots.catalog import NotFound
from restore_agent.snapshots.manifest import EngineRecord, InvalidName
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import publish

COMMAND = ("serve",)


def caller(
    annotations: dict[str, str] | None = None,
    *,
    labels: dict[str, str] | None = None,
    container: str = "engine",
    namespace: str = "team",
    **spec: Any,
) -> CallingPod:
    told = {f"zerowake.dev/{key}": value for key, value in (annotations or {}).items()}
    named = {f"zerowake.dev/{key}": value for key, value in (labels if labels is not None else {"snapshot": "chat"}).items()}
    made = {
        "metadata": {"name": "one", "namespace": "team", "uid": "u", "annotations": told, "labels": named},
        "spec": {"containers": [{"name": "engine", "ports": [{"containerPort": 81}]}, {"name": "sidecar"}], **spec},
    }
    about = Described("id", container, 1, "sha256:0123", "one", "u", namespace, ("10.1.2.3",))
    return CallingPod(None, about, msgspec.convert(made, Pod))  # type: ignore[arg-type]  # nothing here asks the placeholder


def test_an_engine_is_reached_by_annotations_then_by_the_manifest_then_by_the_first_port() -> None:
    manifest = EngineRecord(command=("other",), port=82, health_path="/of-manifest")
    assert caller().record(COMMAND) == EngineRecord(command=COMMAND, port=81)
    assert caller().record(COMMAND, manifest) == EngineRecord(command=COMMAND, port=82, health_path="/of-manifest")
    told = caller({"port": "83", "health": "/told"})
    assert told.record(COMMAND, manifest) == EngineRecord(command=COMMAND, port=83, health_path="/told")


def test_an_annotation_that_is_wrong_is_named() -> None:
    with pytest.raises(Refused, match=r"annotation zerowake\.dev/port: "):
        caller({"port": "none"}).record(COMMAND)
    with pytest.raises(Refused, match=r"annotation zerowake\.dev/port: "):
        caller(container="sidecar").record(COMMAND)  # which has no port


def test_a_model_is_named_by_its_annotation_else_by_its_label() -> None:
    assert caller({"model": "m"}).model == "m"
    assert caller().model == "chat"
    assert caller(labels={"capture": "taken"}).model == "taken"
    assert caller(labels={}).model == ""


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"hostPID": True, "hostNetwork": True}, "the pod asks for hostPID, hostNetwork"),
        ({"hostIPC": True}, "the pod asks for hostIPC"),
        ({"volumes": [{"name": "cache", "emptyDir": {}}, {"name": "v", "hostPath": {"path": "/etc"}}]}, r"volume v .*\(/etc\)"),
    ],
)
def test_access_to_the_node_is_refused(spec: dict[str, object], words: str) -> None:
    with pytest.raises(Refused, match=words):
        caller(**spec).check_allowed()


def test_only_the_engine_s_container_is_restored_into() -> None:
    caller().check_allowed()
    caller({"container": "sidecar"}, container="sidecar").check_allowed()
    with pytest.raises(Refused, match="container sidecar is not the pod's engine, which is engine"):
        caller(container="sidecar").check_allowed()
    assert engine_container(caller({"container": "sidecar"}).pod) == "sidecar"
    assert engine_container(msgspec.convert({"metadata": {}}, Pod)) == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ("", "")),
        ('{"path": "/sum"}', ("/sum", "")),
        ('{"path": "/ask", "body": "as it is"}', ("/ask", "as it is")),
        ('{"path": "/ask", "body": {"a": [1]}}', ("/ask", '{"a": [1]}')),
    ],
)
def test_a_canary_is_read(text: str, found: tuple[str, str]) -> None:
    assert caller({"canary": text}).canary() == found


@pytest.mark.parametrize("text", ["no json", "[]", "1", '{"body": ""}', '{"path": "sum"}', '{"path": 1}'])
def test_a_canary_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(Refused, match=r"annotation zerowake\.dev/canary"):
        caller({"canary": text}).canary()


async def test_its_snapshot_is_one_of_its_own_namespace(tmp_path: Path) -> None:
    store = Store(tmp_path)
    try:
        theirs = publish(store, b"x" * 8192, "chat")
        with pytest.raises(NotFound):
            await caller().snapshot(store)
        ours = publish(store, b"y" * 8192, "chat", namespace="team")
        assert await caller().snapshot(store) == ours
        assert await caller({"digest": ours.digest}).snapshot(store) == ours
        with pytest.raises(NotFound):
            await caller({"digest": theirs.digest}).snapshot(store)
        with pytest.raises(InvalidName):
            await caller(labels={"snapshot": "../chat"}).snapshot(store)
        with pytest.raises(Refused, match=r"the pod has no label zerowake\.dev/snapshot"):
            await caller(labels={}).snapshot(store)
        with pytest.raises(Refused, match="the runtime has the pod in namespace other, the API server in team"):
            await caller(namespace="other").snapshot(store)
    finally:
        store.close()


def test_what_else_an_engine_answers_to_is_a_list_of_names() -> None:
    assert caller().names() == ()
    assert caller({"names": '["sql", "poet"]'}).names() == ("sql", "poet")
    for wrong in ("sql", '{"sql": 1}', '[""]', "[1]"):
        with pytest.raises(Refused, match=r"annotation zerowake\.dev/names is no list of names"):
            caller({"names": wrong}).names()


PROBES = {
    "none": ({}, ""),
    "by number": ({"readinessProbe": {"httpGet": {"path": "/well", "port": 81}}, "livenessProbe": {"tcpSocket": {"port": 81}}}, ""),
    "by name": ({"readinessProbe": {"httpGet": {"path": "/well", "port": "http"}}}, ""),
    "command": ({"livenessProbe": {"exec": {"command": ["true"]}}}, ""),
    "gRPC": ({"livenessProbe": {"grpc": {"port": 81}}}, "its livenessProbe asks by gRPC, which nobody can answer for it"),
    "HTTPS": ({"readinessProbe": {"httpGet": {"port": 81, "scheme": "HTTPS"}}}, "its readinessProbe asks by HTTPS"),
    "elsewhere": ({"livenessProbe": {"tcpSocket": {"port": "other"}}}, "its livenessProbe asks at port other, and its engine's is 81"),
}


@pytest.mark.parametrize(("probes", "why"), PROBES.values(), ids=PROBES.keys())
def test_whether_others_can_answer_its_probes(probes: dict[str, Any], why: str) -> None:
    ports = [{"containerPort": 81, "name": "http"}, {"containerPort": 9, "name": "other"}]
    found = caller(containers=[{"name": "engine", "ports": ports, **probes}]).unanswerable(81)
    assert found.startswith(why) and bool(found) is bool(why)


def test_a_container_of_another_name_has_no_probes() -> None:
    assert caller(container="gone").unanswerable(81) == ""
