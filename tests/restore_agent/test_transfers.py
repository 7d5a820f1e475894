"""`zerowake snapshot push`, `pull`, `copy` and `rm --store` as a user types them, by an agent that runs or without one, over a bucket."""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.programs.transfers import transferred
from restore_agent.snapshots.catalog import Catalog
from tests.worlds.agent import reference, running
from tests.worlds.command import zerowake
from tests.worlds.travelling import node, take

pytestmark = pytest.mark.usefixtures("needs_criu")  # a command without an agent has one in its own process, which mounts


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Of a node that has a snapshot."""
    with node(tmp_path / "state") as store:
        take(store, tmp_path / "model")
    return tmp_path / "state"


@pytest.fixture
def fresh(state: Path, short_folder: Path) -> Path:
    """Of a node with the same keys and no snapshot."""
    shutil.copytree(state / "keys", short_folder / "fresh/keys")
    return short_folder / "fresh"


async def test_a_snapshot_goes_by_a_bucket_from_one_machine_to_another(state: Path, fresh: Path, bucket: str, tmp_path: Path) -> None:
    url = f"s3://{bucket}/fleet"
    said = await zerowake("snapshot", "push", "small", "--to", url, "--state", str(state))
    assert re.search(rf"snapshot default/small@\w{{12}} is in {url}: 10\.8 of 10\.8 MB sent in [\d.]+ s at \d+ MB/s", said)
    assert "0.0 of 10.8 MB sent" in await zerowake("snapshot", "push", "small", "--to", url, "--state", str(state))
    shutil.rmtree(tmp_path / "model")
    said = await zerowake("snapshot", "pull", "small", "--from", url, "--state", str(fresh))
    assert re.search(r"snapshot default/small@\w{12} is on this node: 10\.8 of 10\.8 MB fetched in", said)
    assert "are whole" in await zerowake("snapshot", "verify", "small", "--state", str(fresh))


async def test_what_is_wrong_is_said_in_one_line(
    state: Path, fresh: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}"
    said = await zerowake("snapshot", "pull", "small", "--from", url, "--state", str(fresh), code=1)
    *_, last = said.splitlines()  # an agent whose root is an overlay says before it begins what layers are over
    assert last == f"zerowake: no snapshot default/small on {url}; `zerowake snapshot push` puts one there"
    assert "is no URL of a store" in await zerowake("snapshot", "push", "small", "--to", "models", "--state", str(state), code=1)
    assert "no snapshot default/other on this node" in await zerowake(
        "snapshot", "push", "other", "--to", url, "--state", str(state), code=1
    )
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    said = await zerowake("snapshot", "push", "small", "--to", url, "--state", str(state), code=1)
    *_, last = said.splitlines()
    assert last.startswith(f"zerowake: {url} does not let us (SignatureDoesNotMatch): ") and said.count("zerowake:") == 1


async def test_a_running_agent_is_asked_and_tells_of_what_has_come(fresh: Path, state: Path, tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    url = f"file://{tmp_path}/remote"
    await zerowake("snapshot", "push", "small", "--to", url, "--state", str(state))
    shutil.rmtree(tmp_path / "model")
    async with running(fresh) as agent:
        request = pb.PullRequest(request_id=secrets.token_hex(4), snapshot=reference("small"), stores=[url])
        *_, last = [update async for update in agent.stub.Pull(request)]
        assert last.result.snapshot.digest == Catalog(fresh).get("default", "small").digest
        assert last.result.progress.moved_bytes == last.result.progress.total_bytes > 0
        assert await agent.rung("small") == pb.RUNG_DISK
        assert [update async for update in agent.stub.Pull(request)][-1] == last, "the same request has the same answer"
        said = await zerowake("snapshot", "push", "small", "--to", url, "--state", str(fresh))
        assert "0.0 of" in said
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            _ = [update async for update in agent.stub.Pull(pb.PullRequest(request_id="none", snapshot=reference("small")))]
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        wanted = pb.PullRequest(request_id="other", snapshot=reference("other"), stores=[url])
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            _ = [update async for update in agent.stub.Pull(wanted)]
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_name_is_withdrawn_from_a_bucket(state: Path, fresh: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"s3://{bucket}/fleet"
    await zerowake("snapshot", "push", "small", "--to", url, "--state", str(state))
    said = await zerowake("snapshot", "rm", "small", "--store", url, "--state", str(state))
    assert re.search(rf"the name default/small was withdrawn from {url}; it stood for \w{{12}}, whose bytes stay there", said)
    assert Catalog(state).get("default", "small"), "it is on the node still"
    said = await zerowake("snapshot", "pull", "small", "--from", url, "--state", str(fresh), code=1)
    assert "no snapshot default/small: the name was withdrawn from its store" in said
    assert "withdrawn already" in await zerowake("snapshot", "rm", "small", "--store", url, "--state", str(state), code=1)
    said = await zerowake("snapshot", "gc", "--dry-run", "--store", url, "--state", str(state))
    assert f"{url}: 0 names" in said and "chunks would be removed: 0 objects" in said, "it was withdrawn just now"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "does not let us" in await zerowake("snapshot", "rm", "small", "--store", url, "--state", str(state), code=1)


async def test_snapshots_are_copied_from_store_to_store(state: Path, fresh: Path, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    url, mirror = f"s3://{bucket}/fleet", f"file://{tmp_path}/mirror"
    await zerowake("snapshot", "push", "small", "--to", url, "--state", str(state))
    said = await zerowake("snapshot", "copy", "small", "--from", url, "--to", mirror, "--state", str(fresh))
    assert re.search(rf"snapshot default/small@\w{{12}} is in {mirror}: 10\.8 of 10\.8 MB copied in", said)
    assert Catalog(fresh).list() == []
    said = await zerowake("snapshot", "copy", "--all", "--from", url, "--to", mirror, "--state", str(fresh))
    assert "0.0 of 10.8 MB copied" in said
    (tmp_path / "mirror/names/default/torn.json").write_text("{torn")
    said = await zerowake("snapshot", "copy", "--all", "--from", mirror, "--to", url, "--state", str(fresh), code=1)
    assert "default/torn is not copied" in said
    assert "name one snapshot, or say --all" in await zerowake("snapshot", "copy", "--from", url, "--to", mirror, code=2)


async def test_what_a_store_did_wrong_is_told_though_another_gave_it(state: Path, fresh: Path, tmp_path: Path) -> None:
    for name in ("lying", "honest"):
        (tmp_path / name).mkdir()
        await zerowake("snapshot", "push", "small", "--to", f"file://{tmp_path}/{name}", "--state", str(state))
    shutil.rmtree(tmp_path / "model")
    chunk = max((tmp_path / "lying").rglob("*"), key=lambda path: path.stat().st_size)
    chunk.write_bytes(bytes(chunk.stat().st_size))
    stores = ("--from", f"file://{tmp_path}/lying", "--from", f"file://{tmp_path}/honest")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scaler.programs.cli", "snapshot", "pull", "small", *stores, "--state", str(fresh)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0 and b"is on this node" in out, err
    assert err.count(b"lying") == 1, err  # once: the log of an agent in this process does not say it as well
    assert re.search(rb"zerowake: on the way: .*lying.*", err)
    assert b"\x1b" not in out + err and b"\r" not in out + err


async def test_a_transfer_ends_with_its_result() -> None:
    async def updates() -> AsyncIterator[pb.TransferUpdate]:
        yield pb.TransferUpdate(progress=pb.TransferProgress(done_bytes=1, total_bytes=2))
        yield pb.TransferUpdate(result=pb.TransferResult(seconds=3.0))

    assert (await transferred("pulling small", updates())).seconds == 3.0
