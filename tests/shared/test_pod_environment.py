"""Which variables are a pod's own, by reference and through others, and which of them an engine may keep in another pod."""

from __future__ import annotations

from typing import Any

from zerowake_shared.pod_environment import Reference, bound, differences, digests, fields, references


def field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


CONTAINER: dict[str, Any] = {
    "args": ["--peer", "$(QUEUE_SERVICE_HOST)"],
    "env": [
        field("POD_NAME", "metadata.name"),
        field("NODE", "spec.nodeName"),
        field("INDEX", "metadata.labels['apps.kubernetes.io/pod-index']"),
        field("TEAM", "metadata.labels['team']"),
        field("NOTE", "metadata.annotations['note']"),
        {"name": "THREADS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
        {"name": "ADDRESS", "value": "$(POD_NAME).engines:$(PORT)"},
        {"name": "DEEP", "value": "tcp://$(ADDRESS)"},
        {"name": "ESCAPED", "value": "$$(POD_NAME)"},
        {"name": "EARLY", "value": "$(LATE)"},
        field("LATE", "status.podIP"),
        {"name": "LEVEL", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "level"}}},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "api", "optional": True}}},
    ],
}


def test_what_holds_a_field_of_the_pod_is_followed_through_other_variables() -> None:
    """As the kubelet does it: only what stands before a variable is put into it, and two dollars are one."""
    found = fields(CONTAINER)
    assert found["POD_NAME"] == found["ADDRESS"] == found["DEEP"] == "metadata.name"
    assert (found["THREADS"], found["LATE"], found["NODE"]) == ("limits.cpu", "status.podIP", "spec.nodeName")
    assert not found.keys() & {"ESCAPED", "EARLY", "LEVEL", "KEY"}


def test_what_is_known_to_be_another_in_the_next_pod() -> None:
    """Not what a template gives to all its pods, nor what a node has for all of them."""
    found = bound(CONTAINER, {"team": "a"}, {})
    assert found.keys() == {"POD_NAME", "ADDRESS", "DEEP", "LATE", "INDEX", "NOTE"}


def test_config_maps_and_secrets_are_found() -> None:
    every = {**CONTAINER, "envFrom": [{"configMapRef": {"name": "all"}}, {"prefix": "X_", "secretRef": {"name": "more"}}]}
    assert references(every) == [
        Reference("ConfigMap", "settings", "level"),
        Reference("Secret", "keys", "api"),
        Reference("ConfigMap", "all"),
        Reference("Secret", "more"),
    ]


BEFORE = {"HOSTNAME": "a", "POD_NAME": "a", "THREADS": "4", "KEY": "1", "QUEUE_SERVICE_HOST": "10.0.0.1", "DB_PORT_80_TCP_ADDR": "10.0.0.2"}


def test_nobody_asked_for_the_host_name_or_for_services() -> None:
    after = {**BEFORE, "HOSTNAME": "b", "NEW_SERVICE_PORT_HTTP": "80", "NVIDIA_VISIBLE_DEVICES": "GPU-2", "GPUMEM_SOCKET": "/run/x"}
    del after["DB_PORT_80_TCP_ADDR"]
    found = differences(digests(BEFORE), after, CONTAINER)
    assert (found.stale, found.wrong) == (["DB_PORT_80_TCP_ADDR", "HOSTNAME", "NEW_SERVICE_PORT_HTTP", "NVIDIA_VISIBLE_DEVICES"], [])


def test_what_the_owner_asked_for_is_wrong_when_it_is_old_unless_that_is_allowed() -> None:
    after = {**BEFORE, "POD_NAME": "b", "THREADS": "8"}
    assert differences(digests(BEFORE), after, CONTAINER).wrong == ["POD_NAME", "THREADS"]
    assert differences(digests(BEFORE), after, CONTAINER, allowed=True).stale == ["POD_NAME", "THREADS"]


def test_other_contents_are_another_engine_whatever_is_allowed() -> None:
    """A secret, a literal, a service that an argument names; with `envFrom` whatever has no name of Kubernetes' own."""
    after = {**BEFORE, "KEY": "2", "QUEUE_SERVICE_HOST": "10.0.0.9"}
    assert differences(digests(BEFORE), after, CONTAINER, allowed=True).wrong == ["KEY", "QUEUE_SERVICE_HOST"]
    unnamed = {"envFrom": [{"configMapRef": {"name": "all"}}]}
    found = differences(digests(BEFORE), {**BEFORE, "HOSTNAME": "b", "MODE": "fast"}, unnamed)
    assert (found.stale, found.wrong) == (["HOSTNAME"], ["MODE"])


def test_no_value_can_be_read_from_what_is_remembered() -> None:
    assert "hunter2" not in str(digests({"PASSWORD": "hunter2"}))
    assert digests({"A": "x"})["A"] != digests({"B": "x"})["B"], "nor that two are alike"


def test_what_the_agent_adds_to_a_python_path_is_not_the_engine_s() -> None:
    """Another agent may have another version there, and one of before added nothing."""
    found = digests({"PYTHONPATH": "/opt/mine:/run/zerowake/python/1"})
    assert found == digests({"PYTHONPATH": "/opt/mine:/run/zerowake/python/2"}) == digests({"PYTHONPATH": "/opt/mine"})
    assert digests({"PYTHONPATH": "/run/zerowake/python/1"}) == digests({})
    assert digests({"PYTHONPATH": "/opt/other:/run/zerowake/python/1"}) != found
