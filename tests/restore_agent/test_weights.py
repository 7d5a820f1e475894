"""Weights that gpumem lends, on the host's memory: out of the image, shared by replicas, filled again when the pool has lost them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy
import pytest
from safetensors.numpy import save_file
from zerowake_proto import agent_pb2 as pb

from gpumem.checkpoint.safetensors import keep_reading, read_checkpoint
from gpumem.client.control import Control
from gpumem.hardware.memory import HOST
from restore_agent.drivers.weights import Weights
from restore_agent.snapshots.catalog import Catalog
from restore_agent.snapshots.store import Store
from tests.worlds.agent import Agent, engine, get, running
from tests.worlds.pool import Pool
from tests.worlds.snapshots import publish

WEIGHTS_BYTES = 48 << 20

pytestmark = pytest.mark.usefixtures("needs_criu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    numbers = numpy.random.default_rng(3).integers(0, 255, WEIGHTS_BYTES, dtype=numpy.uint8)
    save_file({"weights": numbers}, folder / "model.safetensors")
    return folder


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with Pool(tmp_path / "gpumem.sock") as started:
        yield started


@pytest.fixture
async def agent(tmp_path: Path, pool: Pool) -> AsyncIterator[Agent]:
    async with running(tmp_path / "state", "--gpumem", str(pool.socket)) as started:
        yield started


async def test_weights_stay_out_of_the_image_and_are_shared(agent: Agent, pool: Pool, checkpoint: Path, mapped: Path) -> None:
    result = await agent.snapshot("lent", engine(mapped, 8), weights=str(checkpoint))
    plain = await agent.snapshot("plain", engine(mapped, 8))
    assert abs(result.image_bytes - plain.image_bytes) < WEIGHTS_BYTES // 4
    answers = await asyncio.gather(*(agent.restore("lent") for _ in range(4)))
    assert [answer.fallback_detail for answer in answers] == [""] * 4
    assert len({str(get(answer.replica, "/sum")) for answer in answers}) == 1
    status = await pool.status()
    (region,) = status.regions
    assert region.leases == 4
    assert region.size >= WEIGHTS_BYTES
    for answer in answers:
        await agent.release(answer.replica)
    assert [region.leases for region in (await pool.status()).regions] == [0]


async def test_an_engine_that_falls_asleep_over_the_request(agent: Agent, checkpoint: Path, mapped: Path) -> None:
    """It was healthy, was asked, and went to sleep before it answered: it is asked again when it is awake."""
    await agent.snapshot("late", engine(mapped, 8, "--late"), weights=str(checkpoint))
    answer = await agent.restore("late")
    assert answer.fallback_detail == ""
    get(answer.replica, "/sum")


async def test_staging_fills_what_the_pool_has_lost(agent: Agent, pool: Pool, checkpoint: Path, mapped: Path) -> None:
    await agent.snapshot("lent", engine(mapped, 8), weights=str(checkpoint))
    (region,) = (await pool.status()).regions
    async with Control.connected(pool.socket) as control:
        await control.evict(reference(region))
    assert not (await pool.status()).regions
    await agent.stage("lent")
    assert [found.sealed for found in (await pool.status()).regions] == [True]
    async with Control.connected(pool.socket) as control:
        await control.evict(reference(region))
    answer = await agent.restore("lent")
    assert answer.replica.origin == pb.ORIGIN_RESTORED, "and a restore fills by itself"
    get(answer.replica, "/sum")


async def test_weights_leave_as_they_are_told_to_but_for_what_others_have(agent: Agent, pool: Pool, checkpoint: Path, mapped: Path) -> None:
    for name in ("lent", "twin"):
        await agent.snapshot(name, engine(mapped, 8), weights=str(checkpoint))
        await agent.stage(name)
    await agent.unstage("lent")
    assert (await agent.unstage("lent", weights=True)).residency.weights_rung == pb.WEIGHTS_RUNG_GPU, "its twin stands in memory"
    answer = await agent.restore("twin")
    assert (await agent.unstage("twin", weights=True)).residency.weights_rung == pb.WEIGHTS_RUNG_GPU, "a replica uses them"
    await agent.release(answer.replica)
    assert (await agent.unstage("twin", weights=True)).residency.weights_rung == pb.WEIGHTS_RUNG_DISK
    assert not (await pool.status()).regions


async def test_an_engine_that_brings_its_own_weights_names_them(agent: Agent, pool: Pool, checkpoint: Path, mapped: Path) -> None:
    keep_reading(checkpoint, read_checkpoint(checkpoint))
    wanted = engine(mapped, 8)
    wanted.env.update({"OWN_WEIGHTS": str(checkpoint), "GPUMEM_SOCKET": str(pool.socket)})
    result = await agent.snapshot("own", wanted)
    plain = await agent.snapshot("plain", engine(mapped, 8))
    assert abs(result.image_bytes - plain.image_bytes) < WEIGHTS_BYTES // 4
    first = await agent.restore("own")
    expected = get(first.replica, "/sum")
    await agent.release(first.replica)
    async with Control.connected(pool.socket) as control:
        await control.evict(reference((await pool.status()).regions[0]))
    answer = await agent.restore("own")
    assert answer.fallback_detail == "", "the snapshot knows where the weights lie"
    assert get(answer.replica, "/sum") == expected


async def test_changed_weights_are_found(agent: Agent, pool: Pool, checkpoint: Path, mapped: Path) -> None:
    await agent.snapshot("lent", engine(mapped, 8), weights=str(checkpoint))
    async with Control.connected(pool.socket) as control:
        await control.evict(reference((await pool.status()).regions[0]))
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(grpc.aio.AioRpcError, match="weights"):
        await agent.stage("lent")
    answer = await agent.restore("lent", cold=engine(mapped, 8))
    assert answer.fallback_reason == "weights-failed", answer.fallback_detail
    assert answer.replica.origin == pb.ORIGIN_COLD


async def test_weights_that_have_moved_are_found_where_the_node_puts_those_from_elsewhere(
    agent: Agent, pool: Pool, checkpoint: Path, mapped: Path
) -> None:
    """The manifest names files within the model's folder: where that is, is the node's to know."""
    await agent.snapshot("lent", engine(mapped, 8), weights=str(checkpoint))
    store = Catalog(agent.state)
    (record,) = store.get("default", "lent").manifest.weights
    assert [part.path for part in record.parts] == ["model.safetensors"]
    async with Control.connected(pool.socket) as control:
        await control.evict(reference((await pool.status()).regions[0]))
    elsewhere = store.fetched_weights(record)
    elsewhere.parent.mkdir(exist_ok=True)
    checkpoint.rename(elsewhere)
    await agent.stage("lent")
    assert [found.sealed for found in (await pool.status()).regions] == [True]
    async with Control.connected(pool.socket) as control:
        await control.evict(reference((await pool.status()).regions[0]))
    shutil.rmtree(elsewhere)
    with pytest.raises(grpc.aio.AioRpcError, match=rf"{checkpoint}/model\.safetensors is not on this node; bring the model there"):
        await agent.stage("lent")


async def test_without_gpumem_the_reason_says_so(tmp_path: Path, checkpoint: Path, mapped: Path) -> None:
    async with running(tmp_path / "state", "--gpumem", str(tmp_path / "nothing.sock")) as agent:
        with pytest.raises(grpc.aio.AioRpcError, match="no gpumem answers"):
            await agent.snapshot("lent", engine(mapped, 8), weights=str(checkpoint))


async def test_gpumem_restarted_between_two_restores(tmp_path: Path, checkpoint: Path, mapped: Path) -> None:
    socket = tmp_path / "gpumem.sock"
    async with running(tmp_path / "state", "--gpumem", str(socket)) as agent:
        async with Pool(socket) as pool:
            await agent.snapshot("lent", engine(mapped, 8), weights=str(checkpoint))
            first = await agent.restore("lent")
            expected = get(first.replica, "/sum")
            pool.process.kill()
            await pool.process.wait()
            assert get(first.replica, "/sum") == expected, "what is mapped stays"
        async with Pool(socket):
            second = await agent.restore("lent")
            assert second.fallback_detail == ""
            assert get(second.replica, "/sum") == expected


def reference(region: object) -> object:
    from zerowake_proto import gpumem_pb2  # noqa: PLC0415

    return gpumem_pb2.RegionRef(device=region.device, id=region.id)


async def test_a_demoted_engine_lets_go_of_what_is_lent(agent: Agent, pool: Pool, checkpoint: Path, mapped: Path) -> None:
    await agent.snapshot("lent", engine(mapped, 8), weights=str(checkpoint))
    replica = (await agent.restore("lent")).replica
    expected = get(replica, "/sum")
    assert await agent.demote(replica) == ""
    assert [region.leases for region in (await pool.status()).regions] == [0]
    async with Control.connected(pool.socket) as control:
        await control.evict(reference((await pool.status()).regions[0]))
    woken = await agent.restore("lent")
    assert woken.replica.origin == pb.ORIGIN_STANDBY, "and its waking fills what was lost meanwhile"
    assert get(woken.replica, "/sum") == expected
    assert [region.leases for region in (await pool.status()).regions] == [1]


async def test_an_engine_that_polls_its_control_directory_is_parked(agent: Agent, pool: Pool, checkpoint: Path, mapped: Path) -> None:
    """As those do that came before doors, and those of others."""
    await agent.snapshot("lent", engine(mapped, 8), weights=str(checkpoint))
    assert (await agent.stage("lent", pb.RUNG_PARKED)).residency.rung == pb.RUNG_PARKED
    assert [region.leases for region in (await pool.status()).regions] == [0]
    replica = (await agent.restore("lent")).replica
    assert replica.origin == pb.ORIGIN_PARKED
    expected = get(replica, "/sum")
    assert await agent.demote(replica, pb.RUNG_PARKED) == ""
    assert [region.leases for region in (await pool.status()).regions] == [0]
    woken = (await agent.restore("lent")).replica
    assert (woken.origin, get(woken, "/sum")) == (pb.ORIGIN_PARKED, expected)
    assert [region.leases for region in (await pool.status()).regions] == [1]


async def test_an_engine_that_does_not_let_go_is_released(tmp_path: Path, pool: Pool, checkpoint: Path, mapped: Path) -> None:
    async with running(tmp_path / "state", "--gpumem", str(pool.socket), program="tests.worlds.impatient") as agent:
        await agent.snapshot("deaf", engine(mapped, 8, "--deaf"), weights=str(checkpoint))
        for rung in (pb.RUNG_STANDBY, pb.RUNG_PARKED):
            answer = await agent.restore("deaf")
            replica = answer.replica
            assert replica.origin == pb.ORIGIN_RESTORED, answer.fallback_detail
            assert "took too long" in await agent.demote(replica, rung)
            assert [region.leases for region in (await pool.status()).regions] == [0]
            await agent.until_rung("deaf", pb.RUNG_MEMORY)  # it is restored as its image comes, which counts once there is room for another


async def test_which_devices_hold_all_that_each_gpu_was_lent_is_asked_of_gpumem(pool: Pool, checkpoint: Path, tmp_path: Path) -> None:
    weights, store = Weights(pool.socket), Store(tmp_path / "store")
    one = await weights.read(checkpoint)
    missing = one.record.model_copy(update={"region": "ab" * 32, "gpu": "GPU-2"})
    records = (one.on("GPU-1").record, one.on("GPU-2").record, missing)
    manifest = publish(store, b"x" * 8192, "ranks", weights=records).manifest
    assert await weights.resident(manifest) == {"GPU-1": set(), "GPU-2": set()}
    await weights.fill(one)
    assert await weights.resident(manifest) == {"GPU-1": {HOST}, "GPU-2": set()}, "of the second one there is a region that is nowhere"
    assert await weights.resident(publish(store, b"y" * 8192, "none").manifest) == {}
    store.close()
