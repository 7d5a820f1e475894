"""The agents' messages as the plan's values; what an older agent leaves out, or a newer one adds, is no error."""

from zerowake_proto import agent_pb2

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet import messages
from scaler.plan.rungs import Rung, WeightsRung
from scaler.plan.world import Gpu, SourceState, Stored, Transfer


def test_a_residency() -> None:
    told = agent_pb2.Residency(
        snapshot=agent_pb2.SnapshotRef(namespace="team", name="chat", digest="ab"),
        rung=agent_pb2.RUNG_MEMORY,
        image_bytes=10,
        weights_bytes=20,
        weights_rung=agent_pb2.WEIGHTS_RUNG_GPU,
        gpu_bytes=[30, 40],
        parked_bytes=[20, 25],
        restore_overhead_seconds=0.5,
        unusable_reason="another kernel",
    )
    found = messages.residency(told)
    assert (found.digest, found.rung, found.weights_rung) == ("ab", Rung.MEMORY, WeightsRung.GPU)
    assert (found.image_bytes, found.weights_bytes, found.gpu_bytes, found.parked_bytes) == (10, 20, (30, 40), (20, 25))
    assert (found.overhead_seconds, found.unusable) == (0.5, "another kernel")
    assert messages.name_of(told.snapshot) == SnapshotName("team", "chat")


def test_a_transfer_and_one_to_a_rung_that_is_newer() -> None:
    progress = agent_pb2.TransferProgress(done_bytes=3, moved_bytes=2, total_bytes=10)
    reference = agent_pb2.SnapshotRef(namespace="team", name="chat", digest="ab")
    found = messages.transfer(agent_pb2.Transfer(snapshot=reference, rung=agent_pb2.RUNG_DISK, progress=progress), 5.0)
    assert found == Transfer(SnapshotName("team", "chat"), "ab", Rung.DISK, 3, 10)
    assert found.since == 5.0
    assert messages.transfer(agent_pb2.Transfer(snapshot=reference), 0.0).rung is Rung.ABSENT


def test_rungs_of_a_newer_agent_are_the_highest_that_are_known() -> None:
    """It is heard on, whatever it has come to know."""
    newer = agent_pb2.Residency.FromString(agent_pb2.Residency(rung=99, weights_rung=98, pinned=97).SerializeToString())  # type: ignore[arg-type]
    found = messages.residency(newer)
    assert (found.rung, found.weights_rung, found.pinned) == (Rung.PARKED, WeightsRung.GPU, Rung.PARKED)
    assert messages.transfer(agent_pb2.Transfer(weights_rung=98), 0.0).weights_rung is WeightsRung.GPU  # type: ignore[arg-type]
    asleep = agent_pb2.Replica(state=agent_pb2.REPLICA_IDLE, rung=99, origin=98)  # type: ignore[arg-type]
    assert (messages.replica(asleep).sleeps, messages.replica(asleep).origin) == (Rung.PARKED, "unknown")


def test_what_is_not_said_is_absent() -> None:
    found = messages.residency(agent_pb2.Residency())
    assert (found.rung, found.weights_rung, found.gpu_bytes, found.parked_bytes) == (Rung.ABSENT, WeightsRung.ABSENT, (), ())


def test_every_rung() -> None:
    known = [agent_pb2.RUNG_ABSENT, agent_pb2.RUNG_DISK, agent_pb2.RUNG_MEMORY, agent_pb2.RUNG_STANDBY, agent_pb2.RUNG_PARKED]
    assert [messages.residency(agent_pb2.Residency(rung=rung)).rung for rung in known] == list(Rung)
    assert sorted(known) == sorted(agent_pb2.Rung.values())[1:]
    newer = agent_pb2.Residency()
    newer.ParseFromString(b"\x10\x09")  # rung: 9
    assert messages.residency(newer).rung is Rung.PARKED, "a higher rung includes the lower ones"


def test_a_node_s_rates_and_gpus() -> None:
    rates = messages.rates(agent_pb2.Bandwidths(disk_to_memory=1, memory_to_process=2, disk_to_gpu=3, memory_to_gpu=4))
    assert (rates.disk_to_memory, rates.memory_to_process, rates.disk_to_gpu, rates.memory_to_gpu) == (1, 2, 3, 4)
    node = agent_pb2.Node(gpus=[agent_pb2.Gpu(uuid="GPU-1", total_bytes=80, free_bytes=70)])
    assert messages.gpus(node) == (Gpu("GPU-1", 80, 70),), "an older agent does not say who has what"
    gpu = agent_pb2.Gpu(uuid="GPU-1", total_bytes=80, free_bytes=70, model="H200", unused_bytes=60, pool_bytes=0, others_bytes=20)
    assert messages.gpus(agent_pb2.Node(gpus=[gpu])) == (Gpu("GPU-1", 80, 70, "H200", 60, 0, None, 20),)
    node = agent_pb2.Node(sources=[agent_pb2.SourceState(name="s3://b", rate=5.0, fault="403")])
    assert messages.sources(node) == (SourceState("s3://b", 5.0, "403"),)


def test_a_replica_and_where_it_is() -> None:
    told = agent_pb2.Replica(
        id="r1", model="chat", snapshot=agent_pb2.SnapshotRef(namespace="team"), origin=agent_pb2.ORIGIN_STANDBY, detail="why"
    )
    found = messages.replica(told)
    assert (found.id, found.model, found.namespace, found.origin, found.detail) == ("r1", "chat", "team", "standby", "why")
    told.origin = 99  # of an agent that is newer
    assert messages.replica(told).origin == "unknown"
    told.origin = agent_pb2.ORIGIN_PARKED
    assert messages.replica(told).origin == "parked"
    endpoint = messages.endpoint(agent_pb2.Endpoint(host="10.0.0.1", port=80, netns="/proc/1/ns/net"))
    assert (endpoint.host, endpoint.port, endpoint.netns) == ("10.0.0.1", 80, "/proc/1/ns/net")


def test_what_a_wake_took_beside_its_weights() -> None:
    told = agent_pb2.Replica()
    for name, seconds in (("image.wake", 0.25), ("weights", 4.0), ("weights.more", 2.0), ("unaccounted", 0.5)):
        told.phases.add(name=name, seconds=seconds)
    assert messages.seconds_beside_weights(told) == 0.75


def test_a_reference_goes_there_and_back() -> None:
    made = messages.reference(SnapshotName("team", "chat"), "ab")
    assert made.digest == "ab" and messages.name_of(made) == SnapshotName("team", "chat")


def test_what_a_store_has_under_a_name() -> None:
    told = agent_pb2.FindResponse(
        snapshot=agent_pb2.SnapshotRef(namespace="ns", name="chat", digest="d"),
        image_bytes=7,
        weights_bytes=3,
        gpu_bytes=[5, 2],
        template_hash="t",
        contents_hash="c",
    )
    assert messages.kept("s3://b/p", told) == messages.Kept(Stored("s3://b/p", "d", 7, 3, (5, 2)), "t", "c")


def test_what_is_pinned_and_an_older_agent_that_says_nothing_of_it() -> None:
    assert messages.residency(agent_pb2.Residency(pinned=agent_pb2.RUNG_MEMORY)).pinned is Rung.MEMORY
    assert messages.residency(agent_pb2.Residency()).pinned is Rung.ABSENT
