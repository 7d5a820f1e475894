"""A cold start of a model whose snapshot does not fit: by real agents, an engine that compiles, and CRIU."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.places.acting_as import User
from restore_agent.sequences.second_best import keep_beside_weights, lay_out_caches, lay_out_weights
from restore_agent.snapshots.catalog import Corrupt, Snapshot
from restore_agent.snapshots.compile_caches import INDEX, InvalidCaches, keep
from restore_agent.snapshots.manifest import PartRecord, WeightsRecord, WeightsRegion, is_second_best, layout_file
from restore_agent.snapshots.store import Store
from tests.worlds.agent import PORT, get, reference, running
from tests.worlds.snapshots import draft

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++: `make test` installs it for root")
KERNELS = 3
ENGINE = Path(__file__).parents[1] / "worlds" / "compiling_engine.py"


def compiling(cache: Path) -> pb.Engine:
    command = [sys.executable, str(ENGINE), str(PORT), str(KERNELS)]
    env = {"PATH": os.environ["PATH"], "TORCHINDUCTOR_CACHE_DIR": str(cache), "HOME": str(cache.parent)}
    return pb.Engine(command=command, env=env, directory="/", port=PORT, health_path="/health", ready_timeout_seconds=60)


@NEEDS_COMPILER
async def test_a_cold_start_finds_what_was_compiled_before_the_snapshot(tmp_path: Path, needs_criu: None) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    (there / "another-model.so").write_text("of another model")
    state = tmp_path / "state"
    async with running(state) as agent:
        await agent.snapshot("small", compiling(there))
        first = (await agent.restore("small")).replica
        assert first.origin == pb.ORIGIN_RESTORED and get(first, "/compiled") == KERNELS
        await agent.release(first)
        kept = sorted(str(path.relative_to(there)) for path in there.rglob("*") if path.is_file() and "another" not in path.name)
        manifest = json.loads((state / "names/default/small/manifest.json").read_text())
        assert [name for name in manifest["files"] if name.startswith("caches/")] == ["caches/000000", INDEX]
        # The machine lost what the engine maps, so that its snapshot fits no more; and where it is started cold the cache is empty.
        shutil.rmtree(there)
        await agent.unstage("small")
        answer = await agent.restore("small", cold=compiling(here))
        assert answer.fallback_reason == "incompatible" and answer.replica.origin == pb.ORIGIN_COLD
        assert get(answer.replica, "/compiled") == 0
        assert get(answer.replica, "/sum") == agent.recorded_answer()
        assert sorted(str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()) == kept
        await agent.release(answer.replica)


@NEEDS_COMPILER
async def test_a_machine_that_the_snapshot_never_fitted_finds_it_too(tmp_path: Path, needs_criu: None) -> None:
    """By a store: when it refuses the snapshot, what that has for a cold start has come, and nothing else."""
    there, here, url = tmp_path / "there", tmp_path / "here", f"file://{tmp_path}/store"
    (tmp_path / "store").mkdir()
    async with running(tmp_path / "one") as agent:
        made = (await agent.snapshot("small", compiling(there))).snapshot
        async for _ in agent.stub.Push(pb.PushRequest(request_id="p", snapshot=reference("small"), store=url)):
            """Its progress is nobody's."""
    shutil.rmtree(there)
    shutil.copytree(tmp_path / "one/keys", tmp_path / "two/keys")
    async with running(tmp_path / "two") as agent:
        for attempt in ("s", "t"):
            request = pb.StageRequest(request_id=attempt, snapshot=made, rung=pb.RUNG_DISK, stores=[url])
            with pytest.raises(grpc.aio.AioRpcError, match="there"):
                await agent.stub.Stage(request)
        assert not list((tmp_path / "two/names").iterdir()) and not list((tmp_path / "two").glob("**/chunks/??/*"))
        answer = await agent.restore("small", cold=compiling(here))
        assert answer.replica.origin == pb.ORIGIN_COLD
        assert get(answer.replica, "/compiled") == 0
        await agent.release(answer.replica)


@NEEDS_COMPILER
async def test_what_was_compiled_before_it_started_and_is_read_is_taken_too(tmp_path: Path, needs_criu: None) -> None:
    cache = tmp_path / "cache"
    async with running(tmp_path / "state") as agent:
        await agent.snapshot("first", compiling(cache))
        (cache / "ab").mkdir(exist_ok=True)
        (cache / "ab/other.so").write_text("nobody reads it")
        await agent.snapshot("second", compiling(cache))
        store = tmp_path / "state/names/default"
        indexes = [json.loads((store / name / INDEX).read_text())["caches"][0]["files"] for name in ("first", "second")]
        names = [[file["path"] for file in index] for index in indexes]
        assert len(names[0]) == 2 * KERNELS and names[0] == names[1]


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    folder = tmp_path / "filled"
    (folder / "aa").mkdir(parents=True)
    (folder / "aa/one.so").write_bytes(b"one" * 1000)
    (folder / "two.so").write_bytes(b"two")
    return folder


@pytest.fixture
def workspace(store: Store, filled: Path) -> Iterator[Path]:
    workspace = store.workspace()
    keep(workspace, {"TRITON_CACHE_DIR": (filled, ["aa/one.so", "two.so"])})
    yield workspace


def published(store: Store, workspace: Path, **fields: object) -> Snapshot:
    with store.chunks.lease() as lease:
        return store.publish(workspace, draft(lease, workspace, b"pages" * 4096, **fields), lease, replace=True)


def test_caches_are_laid_out_and_what_is_there_stays(store: Store, workspace: Path, tmp_path: Path) -> None:
    snapshot = published(store, workspace)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "two.so").write_bytes(b"ours")
    lay_out_caches(store, snapshot, {"TRITON_CACHE_DIR": cache})
    assert (cache / "two.so").read_bytes() == b"ours" and (cache / "aa/one.so").read_bytes() == b"one" * 1000
    assert sorted(path.name for path in cache.iterdir()) == ["aa", "two.so"]


@pytest.mark.parametrize(
    "wrong",
    [{"path": "../out"}, {"path": "/etc/cron.d/out"}, {"mode": 0o4755}, {"path": "aa/../../out"}, {"link": "/etc/passwd"}],
    ids=["above", "absolute", "setuid", "through", "link"],
)
def test_an_index_that_leads_out_of_a_cache_is_refused_whole(
    store: Store, workspace: Path, tmp_path: Path, wrong: dict[str, object]
) -> None:
    index = json.loads((workspace / INDEX).read_text())
    index["caches"][0]["files"][1] |= wrong
    (workspace / INDEX).write_text(json.dumps(index))
    snapshot = published(store, workspace)
    with pytest.raises(InvalidCaches, match=r"compile caches are not laid out"):
        lay_out_caches(store, snapshot, {"TRITON_CACHE_DIR": tmp_path / "cache"})
    assert not (tmp_path / "cache").exists()


def test_a_piece_that_is_altered_is_refused(store: Store, workspace: Path, tmp_path: Path) -> None:
    snapshot = published(store, workspace)
    (snapshot.directory / "caches/000000").write_bytes(b"x" * 3003)
    with pytest.raises(Corrupt, match=r"has changed since it was published"):
        lay_out_caches(store, snapshot, {"TRITON_CACHE_DIR": tmp_path / "cache"})
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_folder_that_others_may_write_is_left_alone(
    store: Store, workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = published(store, workspace)
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    lay_out_caches(store, snapshot, {"TRITON_CACHE_DIR": cache})
    assert not list(cache.iterdir()) and "others may write there" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_in_a_container_they_are_its_user_s(store: Store, workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshot, somebody = published(store, workspace), User(4711, 4712)
    root = tmp_path / "root"
    home, ours = root / "home", root / "ours"
    home.mkdir(parents=True)
    ours.mkdir(mode=0o755)
    for path in (tmp_path, *list(tmp_path.parents)[:-2]):
        path.chmod(path.stat().st_mode | 0o111)
    os.chown(home, somebody.uid, somebody.gid)
    lay_out_caches(store, snapshot, {"TRITON_CACHE_DIR": home / ".triton/cache"}, somebody, root)
    made = [home / ".triton", *(home / ".triton").rglob("*")]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(somebody.uid, somebody.gid)} and len(made) == 5
    lay_out_caches(store, snapshot, {"TRITON_CACHE_DIR": ours / "cache"}, somebody, root)
    assert not list(ours.iterdir()) and "the compile cache /ours/cache cannot be written: Permission denied" in caplog.text


def test_weights_that_were_published_elsewhere_lie_where_the_engine_publishes(store: Store, tmp_path: Path) -> None:
    there, here = tmp_path / "there/weights", tmp_path / "here/weights"
    published_in = there / "model-0123"
    published_in.mkdir(parents=True)
    here.mkdir(parents=True)
    for name, data in {"model.safetensors": b"weights", "reading.json": b"{}", "buffers.pt": b"buffers"}.items():
        (published_in / name).write_bytes(data)
    part = PartRecord(path="model.safetensors", offset=0, first_chunk=0, chunks=0)
    weights = WeightsRecord(region="ab" * 32, size=7, parts=(part,), folder=str(published_in))
    workspace = store.workspace()
    layout = workspace / layout_file(weights)
    layout.parent.mkdir()
    layout.write_bytes(b"")
    keep_beside_weights(WeightsRegion(weights, b"", published_in), there, workspace)
    assert sorted(path.name for path in (layout.parent / weights.region).iterdir()) == ["buffers.pt", "reading.json"]
    snapshot = published(store, workspace, weights=(weights,))
    assert sum(file.size for name, file in snapshot.manifest.files.items() if is_second_best(name)) == len(b"{}buffers")
    fetched = store.fetched_weights(weights)
    fetched.mkdir(parents=True)
    (fetched / "model.safetensors").write_bytes(b"weights")
    for _ in range(2):
        lay_out_weights(store, snapshot, here)
        found = {path.name: path.read_bytes() for path in (here / "model-0123").iterdir()}
        assert found == {"model.safetensors": b"weights", "reading.json": b"{}", "buffers.pt": b"buffers"}
    assert (here / "model-0123/model.safetensors").samefile(fetched / "model.safetensors"), "they take no room twice"
    assert [path.name for path in here.iterdir()] == ["model-0123"]


def test_of_weights_that_are_a_models_own_nothing_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    record = WeightsRecord(region="ab" * 32, size=0, parts=(), folder=str(tmp_path / "model"))
    keep_beside_weights(WeightsRegion(record, b"", tmp_path / "model"), tmp_path / "weights", tmp_path / "workspace")
    assert not (tmp_path / "workspace").exists()
