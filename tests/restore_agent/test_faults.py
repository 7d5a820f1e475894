"""What goes wrong: torn and changed files, a full disk, taken names, engines that fail, and kill -9 at every step."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.snapshots.catalog import Catalog
from tests.worlds.agent import Agent, copy_state, engine, get, reference, running
from tests.worlds.leftovers import huge_pages_are_back, left_behind, nothing_left
from tests.worlds.processes import below
from tests.worlds.waiting import until


def snapshot_folder(state: Path) -> Path:
    return Catalog(state).get("default", "small").directory


def largest_chunk(state: Path) -> Path:
    return max((state / "chunks").glob("*/*"), key=lambda path: path.stat().st_size)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit in pages": (lambda state: flip(largest_chunk(state), 100), "corrupt"),
    "torn pages": (lambda state: truncate(largest_chunk(state)), "corrupt"),
    "longer pages": (lambda state: largest_chunk(state).write_bytes(largest_chunk(state).read_bytes() + b"x"), "corrupt"),
    "missing pages": (lambda state: largest_chunk(state).unlink(), "corrupt"),
    "a flipped bit in CRIU's inventory": (lambda state: flip(snapshot_folder(state) / "images/inventory.img", 12), "corrupt"),
    "a torn pagemap": (lambda state: os.truncate(next((snapshot_folder(state) / "images").glob("pagemap-*.img")), 9), "corrupt"),
    "a missing index": (lambda state: (snapshot_folder(state) / "pages.index").unlink(), "corrupt"),
    "an edited manifest": (
        lambda state: (snapshot_folder(state) / "manifest.json").write_text(
            (snapshot_folder(state) / "manifest.json").read_text().replace('"model":"small"', '"model":"other"')
        ),
        "corrupt",
    ),
    "a missing signature": (lambda state: (snapshot_folder(state) / "signature.json").unlink(), "untrusted"),
    "a revoked key": (lambda state: Catalog(state).keyring.revoke(Catalog(state).keyring.signing), "untrusted"),
    "no such name": (lambda state: (state / "names/default/small").unlink(), "not-found"),
}


@pytest.mark.parametrize("how", SPOILED)
async def test_a_spoiled_snapshot_is_a_cold_start(how: str, state: Path, mapped: Path) -> None:
    spoil, reason = SPOILED[how]
    folder = snapshot_folder(state)
    spoil(state)
    async with running(state) as agent:
        answer = await agent.restore("small", cold=engine(mapped))
        assert answer.replica.origin == pb.ORIGIN_COLD
        assert answer.fallback_reason == reason, answer.fallback_detail
        assert answer.fallback_detail
        get(answer.replica, "/sum")
        again = await agent.restore("small", cold=engine(mapped))
        assert again.replica.origin == pb.ORIGIN_COLD
    assert left_behind(state) == []
    assert folder.exists() or reason == "not-found", "a spoiled snapshot stays for a look at it"


@pytest.mark.parametrize("how", ["a flipped bit in pages", "missing pages", "an edited manifest", "a revoked key", "a missing index"])
async def test_damage_is_told_while_the_agent_runs(how: str, state: Path) -> None:
    """To whoever listens, before anybody wants to restore it."""
    async with running(state) as agent, asyncio.timeout(30):
        updates = agent.stub.Watch(pb.WatchRequest())
        async for update in updates:
            if update.HasField("residency"):
                assert not update.residency.unusable_reason
            if update.synced:
                break
        assert (await agent.restore("small")).replica.origin == pb.ORIGIN_RESTORED, "it has looked at it once"
        SPOILED[how][0](state)
        async for update in updates:
            if update.HasField("residency") and (why := update.residency.unusable_reason):
                assert update.residency.snapshot.name == "small"
                assert why
                break
        updates.cancel()


async def test_without_a_command_the_manifest_names_the_engine(state: Path) -> None:
    flip(largest_chunk(state), 0)
    async with running(state) as agent:
        assert (await agent.restore("small")).replica.origin == pb.ORIGIN_COLD


async def test_without_any_command_the_reason_is_the_answer(state: Path) -> None:
    (snapshot_folder(state) / "signature.json").write_text("forged")
    async with running(state) as agent:
        with pytest.raises(grpc.aio.AioRpcError, match="its signature is torn; take the snapshot again") as refused:
            await agent.restore("small")
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert ("zerowake-reason", "untrusted") in list(refused.value.trailing_metadata() or ())


async def test_a_changed_library_is_found(agent: Agent, captured: Path, mapped: Path, tmp_path: Path) -> None:
    """CRIU would restore over it without a word: same size, other content."""
    file = tmp_path / "weights.bin"
    file.write_bytes(os.urandom(1 << 20))
    await agent.snapshot("mapping", engine(file))
    kept = (await agent.restore("mapping")).replica
    await agent.unstage("mapping")
    touched = file.read_bytes()
    file.write_bytes(touched)
    assert (await agent.restore("mapping")).replica.origin == pb.ORIGIN_RESTORED, "the same content in a rewritten file will do"
    await agent.unstage("mapping")
    file.write_bytes(os.urandom(1 << 20))
    answer = await agent.restore("mapping", cold=engine(file))
    assert answer.fallback_reason == "incompatible"
    assert str(file) in answer.fallback_detail
    await agent.release(kept)


async def test_a_taken_name_costs_nothing(agent: Agent, mapped: Path) -> None:
    before = Catalog(agent.state).get("default", "small").digest
    with pytest.raises(grpc.aio.AioRpcError, match="exists") as taken:
        await agent.snapshot("small", engine(mapped))
    assert taken.value.code() == grpc.StatusCode.ALREADY_EXISTS
    assert Catalog(agent.state).get("default", "small").digest == before
    await agent.snapshot("small", engine(mapped), replace=True)
    assert Catalog(agent.state).get("default", "small").digest != before
    assert len(list((agent.state / "snapshots").iterdir())) == 1, "the replaced one is gone, and its chunks"


async def test_what_cannot_be_used_is_removed_or_replaced_like_anything_else(agent: Agent, mapped: Path) -> None:
    folder = snapshot_folder(agent.state)
    (folder / "signature.json").rename(folder / "seal")
    with pytest.raises(grpc.aio.AioRpcError, match=r"exists already, and cannot be used: .* an older zerowake") as taken:
        await agent.snapshot("small", engine(mapped))
    assert taken.value.code() == grpc.StatusCode.ALREADY_EXISTS
    await agent.snapshot("small", engine(mapped), replace=True)
    assert (await agent.restore("small")).replica.origin == pb.ORIGIN_RESTORED
    (snapshot_folder(agent.state) / "manifest.json").write_text("{}")
    gone = (await agent.unstage("small", pb.RUNG_ABSENT)).residency
    assert (gone.snapshot.namespace, gone.snapshot.name, gone.rung) == ("default", "small", pb.RUNG_ABSENT)
    # The image may be on its way into memory still, which needs its folder until it is there.
    await until(lambda: not [*(agent.state / "chunks").glob("*/*"), *(agent.state / "snapshots").iterdir()], "nothing of it is left")


async def test_a_removed_snapshot_leaves_no_bytes(agent: Agent) -> None:
    await agent.stage("small")
    await agent.unstage("small", pb.RUNG_ABSENT)
    assert list((agent.state / "chunks").glob("*/*")) == []
    assert list((agent.state / "snapshots").iterdir()) == []


async def test_captures_at_once_and_a_removal_between_them_lose_no_bytes(agent: Agent, mapped: Path) -> None:
    split, removed = asyncio.Event(), asyncio.Event()

    async def capture(name: str, mebibytes: int) -> None:
        async for update in agent.snapshot_updates(name, engine(mapped, mebibytes)):
            if update.progress.phase == "prove":  # its chunks are written, and no manifest names them
                split.set()
                await removed.wait()

    async def remove() -> None:
        await split.wait()
        await agent.unstage("small", pb.RUNG_ABSENT)
        removed.set()

    await asyncio.wait_for(asyncio.gather(capture("one", 8), capture("two", 9), remove()), 60)
    catalog = Catalog(agent.state)
    for name in ("one", "two"):
        catalog.verify(catalog.get("default", name))
    restored = await asyncio.gather(*(agent.restore(name) for name in ("one", "two", "one")))
    assert [response.replica.origin for response in restored] == [pb.ORIGIN_RESTORED] * 3


@pytest.mark.parametrize(("mebibytes", "says"), [(80, "what its engine holds"), (300, "(?i)no space|failed|cannot|write|MiB free")])
async def test_a_full_disk_loses_nothing(captured: Path, tmp_path: Path, mapped: Path, mebibytes: int, says: str) -> None:
    """Too full as its dump would begin, or from then on: the old snapshot stays, the new one leaves no trace."""
    disk = tmp_path / "disk"
    disk.mkdir()
    old = sum(path.stat().st_size for path in captured.rglob("*") if path.is_file())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={old + (mebibytes << 20)}", "tmpfs", disk], check=True)

    async def capture(agent: Agent) -> None:
        async for update in agent.snapshot_updates("large", engine(mapped, 32)):
            if update.progress.phase == "dump" and not (filler := disk / "others").exists():
                with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while file.write(bytes(1 << 20)):
                        """Until it is full."""

    try:
        state = copy_state(captured, disk / "state")
        async with running(state) as agent:
            with pytest.raises(grpc.aio.AioRpcError, match=says):
                await capture(agent)
            assert list((state / "tmp").iterdir()) == []
            assert (await agent.restore("small")).replica.origin == pb.ORIGIN_RESTORED
        assert left_behind(state) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (["/no/such/program"], "No such file"),
        (["/bin/sh", "-c", "echo the engine says why; exit 4"], "exit code 4\n.*the engine says why"),
        (["/bin/sh", "-c", "kill -SEGV $$"], "SIGSEGV"),
    ],
)
async def test_an_engine_that_fails_is_quoted(agent: Agent, command: list[str], word: str) -> None:
    broken = pb.Engine(command=command, env={"PATH": os.environ["PATH"]}, port=8000, ready_timeout_seconds=10)
    for call in (
        agent.stub.Restore(pb.RestoreRequest(request_id="cold", model="broken", cold=broken)),
        agent.snapshot("broken", broken),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call
        assert re.search(word, failed.value.details() or "", re.DOTALL), failed.value.details()


async def test_an_engine_that_never_listens_has_a_deadline(agent: Agent) -> None:
    deaf = pb.Engine(command=["sleep", "1000"], env={"PATH": os.environ["PATH"]}, port=8000, ready_timeout_seconds=0.5)
    with pytest.raises(grpc.aio.AioRpcError, match="not healthy within"):
        await agent.stub.Restore(pb.RestoreRequest(request_id="deaf", model="deaf", cold=deaf))


async def test_a_snapshot_that_answers_otherwise_is_not_published(agent: Agent, mapped: Path) -> None:
    """`/count` differs at every request: as a canary it can only fail."""
    request = pb.SnapshotRequest(
        request_id="unproved", snapshot=reference("unproved"), model="m", engine=engine(mapped), canary=pb.Canary(path="/count")
    )
    with pytest.raises(grpc.aio.AioRpcError, match="answers the recorded request"):
        # The dump holds a count of one; one more request is asked of the source before, none of the replica.
        async for _ in agent.stub.Snapshot(request):
            pass
    with pytest.raises(grpc.aio.AioRpcError) as missing:
        await agent.stage("unproved")
    assert missing.value.code() == grpc.StatusCode.NOT_FOUND


async def test_two_agents_do_not_share_a_folder(agent: Agent) -> None:
    second = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "scaler.programs.cli", "agent", "--state", str(agent.state)], stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(second.communicate(), 20)
    assert second.returncode == 1
    assert b"in use by another zerowake agent" in said
    await agent.restore("small")


@pytest.mark.parametrize("phase", ["ready", "dump", "split", "prove", "publish"])
async def test_an_agent_killed_while_it_takes_a_snapshot(phase: str, state: Path, mapped: Path) -> None:
    async with running(state) as agent:
        with pytest.raises(grpc.aio.AioRpcError):
            async for update in agent.snapshot_updates("half", engine(mapped, 64)):
                if update.progress.phase == phase:
                    agent.kill()
        await agent.process.wait()
    await nothing_left(state)
    await the_next_start_works(state)
    names = [path.name for path in (state / "names" / "default").iterdir()]
    assert names == ["small"] or phase == "publish"


@pytest.mark.parametrize("milliseconds", [2, 8, 15, 25, 40, 80])
async def test_an_agent_killed_while_it_restores(milliseconds: int, state: Path) -> None:
    async with running(state) as agent:
        await agent.stage("small")
        calls = [asyncio.create_task(agent.restore("small")) for _ in range(3)]
        await asyncio.wait(calls, timeout=milliseconds / 1000)
        agent.kill()
        await agent.process.wait()
        await asyncio.gather(*calls, return_exceptions=True)
    await nothing_left(state)
    await the_next_start_works(state)
    await huge_pages_are_back()


async def the_next_start_works(state: Path) -> None:
    async with running(state) as agent:
        answer = await agent.restore("small")
        assert answer.replica.origin == pb.ORIGIN_RESTORED, answer.fallback_detail
        expected = json.loads(Catalog(state).get("default", "small").manifest.canary.answer)
        assert get(answer.replica, "/sum") == expected
        assert list((state / "tmp").iterdir()) == []
    assert left_behind(state) == []


async def test_criu_killed_in_a_restore_is_a_cold_start(agent: Agent, mapped: Path) -> None:
    await agent.stage("small")
    call = asyncio.create_task(agent.restore("small", cold=engine(mapped)))
    killed = False
    while not call.done() and not killed:
        for _, pid, words in below(agent.process.pid):  # another test's agent may be restoring just now
            if "swrk" in words or "restore --rpc" in words:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed = True
        await asyncio.sleep(0)
    answer = await call
    assert killed
    assert answer.fallback_reason == "criu-failed", answer
    get(answer.replica, "/sum")
