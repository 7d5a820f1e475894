"""What a ModelSnapshot says by itself: whether its digest may be used, when another capture is needed, since when a condition holds."""

from typing import Any

import msgspec
import pytest

from scaler.kubernetes.resources import Condition, ModelSnapshot, with_condition

DIGEST = "ab" * 32


def snapshot(**spec: Any) -> ModelSnapshot:
    made = {"metadata": {"namespace": "team", "name": "chat", "uid": "u"}, "spec": {"template": {"spec": {}}, "port": 80, **spec}}
    return msgspec.convert(made, ModelSnapshot)


def ready(one: ModelSnapshot, status: str = "True", of: str = "") -> ModelSnapshot:
    conditions = (Condition(type="Ready", status=status),)
    told = msgspec.structs.replace(one.status, digest=DIGEST, conditions=conditions, template_hash=of or one.template_hash)
    return msgspec.structs.replace(one, status=told)


def test_a_digest_is_used_while_it_is_ready_and_of_the_template_as_it_is() -> None:
    one = snapshot()
    assert one.ready_digest == ""
    assert ready(one).ready_digest == DIGEST
    assert ready(one, status="False").ready_digest == ""
    assert ready(one, of="another").ready_digest == ""
    leaving = msgspec.structs.replace(one.metadata, deletion_timestamp="2026-11-26T00:00:00Z")
    assert msgspec.structs.replace(ready(one), metadata=leaving).ready_digest == ""


@pytest.mark.parametrize("change", [{"port": 81}, {"template": {"spec": {"x": 1}}}, {"model": "other"}, {"container": "engine"}])
def test_what_a_capture_is_made_from_changes_the_hash(change: dict[str, Any]) -> None:
    assert snapshot(**change).template_hash != snapshot().template_hash


def test_what_it_is_not_made_from_does_not() -> None:
    assert snapshot(limits={"concurrency": 3}).template_hash == snapshot().template_hash
    assert snapshot(limits={"concurrency": 3}).limits.concurrency == 3


def test_names_are_the_object_s_own_unless_said() -> None:
    assert (snapshot().model, snapshot().artifact_name) == ("chat", "chat")
    assert snapshot(model="smol", artifact={"name": "kept", "digest": DIGEST}).artifact_name == "kept"


def test_a_condition_s_time_is_of_its_last_change() -> None:
    first = with_condition((), Condition(type="Ready", status="False", message="one"), 0.0)
    same = with_condition(first, Condition(type="Ready", status="False", message="two"), 60.0)
    assert same[0].message == "two" and same[0].last_transition_time == first[0].last_transition_time
    changed = with_condition((*same, Condition(type="Other", status="True")), Condition(type="Ready", status="True"), 60.0)
    assert {each.type for each in changed} == {"Ready", "Other"}
    (now,) = (each for each in changed if each.type == "Ready")
    assert now.last_transition_time > first[0].last_transition_time
