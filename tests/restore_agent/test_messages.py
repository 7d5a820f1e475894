"""The agent's messages and the node's values: what is read from the one, and said of the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.service import messages
from restore_agent.snapshots.manifest import EngineRecord, InvalidName, WeightsRecord
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import publish


def test_an_engine_says_what_it_has_to_and_the_rest_is_usual() -> None:
    assert messages.engine_record(pb.Engine(command=["serve"], port=80)) == EngineRecord(
        command=("serve",), env={}, directory="/", port=80, health_path="/health", ready_timeout_seconds=600.0
    )
    whole = pb.Engine(command=["a", "b"], env={"K": "V"}, directory="/srv", port=1, health_path="/ok", ready_timeout_seconds=2.5)
    assert messages.engine_record(whole) == EngineRecord(
        command=("a", "b"), env={"K": "V"}, directory="/srv", port=1, health_path="/ok", ready_timeout_seconds=2.5
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"port": 80}, "engine.command: "),
        ({"command": ["x"]}, "engine.port: "),
        ({"command": ["x"], "port": 70000}, "engine.port: "),
        ({"command": ["x"], "port": 1, "ready_timeout_seconds": -1.0}, "engine.ready_timeout_seconds: "),
    ],
)
def test_a_field_of_an_engine_that_is_wrong_is_named(fields: dict[str, object], field: str) -> None:
    with pytest.raises(messages.InvalidField) as raised:
        messages.engine_record(pb.Engine(**fields))
    assert str(raised.value).startswith(field)


ENGINE = pb.Engine(command=["serve"], port=80)


def test_a_capture_is_named_after_its_snapshot_where_nothing_else_is_said() -> None:
    wanted = messages.capture_request(pb.SnapshotRequest(snapshot=pb.SnapshotRef(name="chat"), engine=ENGINE))
    assert (wanted.namespace, wanted.name, wanted.model, wanted.weights, wanted.replace) == ("default", "chat", "chat", None, False)
    canary = pb.Canary(path="/ask", body=b'{"a": 1}')
    reference = pb.SnapshotRef(namespace="team", name="chat")
    wanted = messages.capture_request(
        pb.SnapshotRequest(snapshot=reference, model="m", engine=ENGINE, canary=canary, weights="/w", replace=True, adapters=["sql"])
    )
    assert (wanted.namespace, wanted.model, wanted.weights, wanted.replace) == ("team", "m", Path("/w"), True)
    assert (wanted.canary_path, wanted.canary_body, wanted.adapters) == ("/ask", '{"a": 1}', ("sql",))


def test_a_capture_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(InvalidName, match=r"name '\.\./x' is not allowed"):
        messages.capture_request(pb.SnapshotRequest(snapshot=pb.SnapshotRef(name="../x"), engine=ENGINE))
    with pytest.raises(messages.InvalidField, match=r"^canary\.body: "):
        messages.capture_request(
            pb.SnapshotRequest(snapshot=pb.SnapshotRef(name="x"), engine=ENGINE, canary=pb.Canary(path="/", body=b"\xff"))
        )


def test_a_snapshot_that_is_gone_is_absent_by_its_whole_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    snapshot = publish(store, b"x" * 8192, "one")
    gone = messages.removed(snapshot, 7)
    assert (gone.rung, gone.revision) == (pb.RUNG_ABSENT, 7)
    assert gone.snapshot == pb.SnapshotRef(namespace="default", name="one", digest=snapshot.digest)
    store.close()


def test_weights_of_several_ranks_count_as_what_one_gpu_gets(tmp_path: Path) -> None:
    """They are filled at once: what the estimate counts is the largest share."""
    store = Store(tmp_path)
    records = [("a", 5, "GPU-1"), ("b", 3, "GPU-2"), ("c", 4, "GPU-2")]
    weights = tuple(WeightsRecord(region=region, size=size, parts=(), gpu=gpu) for region, size, gpu in records)
    ranks, alone = publish(store, b"x" * 8192, "ranks", weights=weights), publish(store, b"y" * 8192, "alone")
    assert messages._weights_bytes(ranks.manifest) == 7
    assert messages._weights_bytes(alone.manifest) == 0
    store.close()
