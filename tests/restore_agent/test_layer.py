"""Layers of replicas: real engines that keep their state in files, taken and restored at once by a real agent and a real CRIU."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from importlib.util import cache_from_source
from pathlib import Path

import grpc
import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.places import mount_table
from restore_agent.places.layer import Layer, _Over, _plan, holder, unlayered
from restore_agent.places.mount_table import parse, read, visible
from restore_agent.places.place import PlaceError
from restore_agent.places.sandbox import Sandbox
from tests.worlds.agent import PORT, Agent, get, running
from tests.worlds.exhausted import descriptors_left
from tests.worlds.leftovers import left_behind, nothing_left

ENGINE = Path(__file__).parent.parent / "worlds" / "writing_engine.py"


@pytest.fixture
async def agent(tmp_path: Path, places: dict[str, Path], needs_criu: None) -> AsyncIterator[Agent]:
    async with running(tmp_path / "state") as started:
        yield started
    assert left_behind(tmp_path / "state") == []
    assert list((tmp_path / "state/layers").iterdir()) == []


@pytest.fixture
def places(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Folders for an engine to write into: on the machine's root, in a file system of its own, in /run."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nosuid,mode=1777", "tmpfs", str(mounted)], check=True)
    yield {"root": tmp_path / "folder", "mounted": mounted / "folder", "run": Path("/run/engine")}
    subprocess.run(["umount", str(mounted)], check=True)


def engine(folder: Path, *traits: str, shared: tuple[Path, ...] = (), **env: str) -> pb.Engine:
    return pb.Engine(
        command=[sys.executable, str(ENGINE), str(PORT), str(folder), *traits],
        env={"PATH": os.environ["PATH"], **env},
        directory="/",
        port=PORT,
        health_path="/health",
        ready_timeout_seconds=20,
        shared=map(str, shared),
    )


async def restored(agent: Agent, count: int, name: str = "writes") -> list[pb.Replica]:
    """So many at once; none of them cold."""
    answers = await asyncio.gather(*(agent.restore(name) for _ in range(count)))
    assert [answer.fallback_detail for answer in answers] == [""] * count
    return [answer.replica for answer in answers]


@pytest.mark.parametrize("where", ["root", "mounted", "run"])
async def test_replicas_meet_in_no_file(agent: Agent, places: dict[str, Path], where: str) -> None:
    """Sockets, files without names, logs, shared mappings, locks, numbers, a database, pipes: each has its own, as it was at the dump."""
    folder = places[where]
    traits = ["backend", "deleted", "log", "mapped", "sequence", "database", "special"]
    await agent.snapshot("writes", engine(folder, *traits), canary=pb.Canary(path="/write"))
    before = (folder.parent.exists() and sorted(folder.parent.iterdir())) or []
    replicas = await restored(agent, 4)
    for turn in (3, 4):  # the recorded request was asked twice
        for replica in replicas:
            assert get(replica, "/backend") == turn
            assert get(replica, "/log") == turn
            assert get(replica, "/mapped") == [turn, turn]
            assert get(replica, "/sequence") == [turn, True]
            assert get(replica, "/database") == turn
            note = "" if where == "run" else "noted"
            assert get(replica, "/special") == ["kept in the pipe", "prw--w----", "real", True, [1000, 1001, "-rw-r-----", note], False]
    seen = [get(replica, "/deleted") for replica in replicas]
    assert seen == [seen[0]] * 4
    for replica in replicas:
        await agent.release(replica)
    assert get((await restored(agent, 1))[0], "/log") == 3, "it was the dump's own state, again"
    assert ((folder.parent.exists() and sorted(folder.parent.iterdir())) or []) == before
    assert not folder.exists(), "and the machine has nothing of it"


async def test_a_file_of_the_machine_that_was_removed_is_not_there_for_the_replica_only(agent: Agent, places: dict[str, Path]) -> None:
    folder = places["root"]
    folder.mkdir()
    (folder / "of-the-machine").write_text("here")
    await agent.snapshot("writes", engine(folder, "special"), canary=pb.Canary(path="/write"))
    for replica in await restored(agent, 2):
        answer = get(replica, "/special")
        assert isinstance(answer, list)
        assert answer[-1] is False
    assert (folder / "of-the-machine").read_text() == "here"


@pytest.mark.skipif(visible(read())[0].kind == "overlay", reason="what is watched on an overlay CRIU cannot find again")
async def test_folders_are_watched_on(agent: Agent, places: dict[str, Path]) -> None:
    await agent.snapshot("writes", engine(places["root"], "watched"), canary=pb.Canary(path="/write"))
    for replica in await restored(agent, 3):
        assert get(replica, "/watched") == 2


async def test_a_large_file_without_a_name(agent: Agent, places: dict[str, Path]) -> None:
    await agent.snapshot("writes", engine(places["root"], "deleted", SIZE="100"), canary=pb.Canary(path="/write"))
    for replica in await restored(agent, 2):
        answer = get(replica, "/deleted")
        assert isinstance(answer, list)
        assert answer[0] == 100 << 20


async def test_a_shared_folder_is_the_machine_s(agent: Agent, places: dict[str, Path]) -> None:
    """Missing folders are made; cold replicas, restored ones and the machine write into one log."""
    folder = places["mounted"] / "logs"
    wanted = engine(folder, "append", shared=(folder,))
    await agent.snapshot("writes", wanted, canary=pb.Canary(path="/write"))
    replicas = await restored(agent, 2)
    cold = await agent.stub.Restore(pb.RestoreRequest(request_id="c", model="cold", cold=wanted))
    assert [get(replica, "/append") for replica in [*replicas, cold.replica]] == [5, 6, 7]
    assert (folder / "access.log").read_text() == "a replica\n" * 7, "of the recorded request two, of two proofs one each"


async def test_what_cannot_be_restored_twice_is_found_at_once(agent: Agent, places: dict[str, Path]) -> None:
    """In a shared folder replicas meet, so that the second proof finds another file than the first."""
    folder = places["root"]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await agent.snapshot("writes", engine(folder, "log", shared=(folder,)), canary=pb.Canary(path="/write"))
    said = str(refused.value.details())
    assert "engine.log has bad size" in said
    assert f"{folder} is shared" in said
    assert "have it opened for appending" in said


async def test_what_went_with_a_replica_is_said(agent: Agent, places: dict[str, Path]) -> None:
    folder = places["root"]
    result = await agent.snapshot("writes", engine(folder, "log", "database"), canary=pb.Canary(path="/write"))
    (note,) = [note for note in result.notes if "random state" not in note]
    assert f"{folder}/engine.log" in note
    assert "--shared" in note
    (replica,) = await restored(agent, 1)
    assert get(replica, "/log") is not None
    await agent.release(replica)
    said = (agent.state.parent / "agent.log").read_text()
    assert f"replica {replica.id} has ended, and with it what it wrote: {folder}/engine.log (" in said
    assert f"{folder}/state.db" not in said, "that it has not written since it was restored"


async def test_too_much_is_refused_with_the_way_out(agent: Agent, places: dict[str, Path]) -> None:
    wanted = engine(places["root"])
    fill = f"mkdir -p {places['root']}/hub && head -c 600000000 /dev/zero > {places['root']}/hub/model && exec "
    wanted.command[:] = ["sh", "-c", fill + " ".join(wanted.command)]
    with pytest.raises(grpc.aio.AioRpcError, match=rf"572 MiB of it into {places['root']}/hub; name that folder with --shared"):
        await agent.snapshot("writes", wanted, canary=pb.Canary(path="/write"))
    wanted.shared.append(str(places["root"] / "hub"))
    await agent.snapshot("writes", wanted, canary=pb.Canary(path="/write"))
    assert (places["root"] / "hub/model").stat().st_size == 600_000_000


async def test_an_agent_that_is_killed_leaves_what_the_next_one_removes(tmp_path: Path, needs_criu: None) -> None:
    state, folder = tmp_path / "state", tmp_path / "folder"
    async with running(state) as agent:
        await agent.snapshot("writes", engine(folder, "log"), canary=pb.Canary(path="/write"))
        await restored(agent, 2)
        agent.kill()
        await agent.process.wait()
        await nothing_left(state)
        assert len(list((state / "layers").iterdir())) >= 2, "and one may stand ready"
    async with running(state) as agent:
        assert list((state / "layers").iterdir()) == []
        await restored(agent, 1)


async def test_bytecode_is_the_machine_s_when_a_replica_has_ended(tmp_path: Path, needs_criu: None) -> None:
    for name in ("kept", "changed"):
        (tmp_path / f"{name}.py").write_text("pass")
    async with await Sandbox.create(tmp_path / "criu.kdat") as sandbox:
        output = sandbox.output("test")
        with output.writers() as fds:
            command = ["sh", "-c", f"cd {tmp_path} && echo 'x = 1' > changed.py && {sys.executable} -c 'import kept, changed'"]
            pid = await sandbox.spawn(command, {}, "/", fds, engine=True)
        assert await asyncio.wait_for(asyncio.shield(sandbox.exit_of(pid)), 10) == 0
        output.close()
        assert not (tmp_path / "__pycache__").exists()
    assert [path.name for path in (tmp_path / "__pycache__").iterdir()] == [Path(cache_from_source("kept.py")).name]
    assert (tmp_path / "changed.py").read_text() == "pass"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=3", "tmpfs", str(tmp_path)], check=True)
    try:
        with pytest.raises(PlaceError, match=f"no space is left in {tmp_path}/layers, where replicas keep what they write: make room"):
            Layer.make(tmp_path / "layers", [])
        assert list((tmp_path / "layers").iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_one_that_is_made_is_removed_whole(tmp_path: Path) -> None:
    layer = Layer.make(tmp_path / "a,b:c", [])
    (own,) = (tmp_path / "a,b:c").iterdir()
    layer.remove()
    assert not own.exists()
    shutil.rmtree(tmp_path)


def test_one_that_cannot_be_removed_for_want_of_descriptors_goes_with_the_next(tmp_path: Path) -> None:
    first, second = Layer.make(tmp_path / "layers", []), Layer.make(tmp_path / "layers", [])
    with descriptors_left(0):
        first.remove()
    assert len(list((tmp_path / "layers").iterdir())) == 2
    second.remove()
    assert list((tmp_path / "layers").iterdir()) == []


ROOT_OVERLAY = """\
27 1 0:46 / / rw - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w
28 27 8:1 / /home rw,nosuid - ext4 /dev/sda rw
29 27 0:40 / /usr/local ro - squashfs /dev/sdb ro
30 27 0:41 / /etc/hostname rw - ext4 /dev/sda rw
31 27 0:42 / /mnt rw - hugetlbfs none rw
32 27 0:43 / /run/lock rw - tmpfs none rw
33 27 0:44 / /opt rw - ext4 /dev/sdc rw
"""


def test_where_layers_lie_over_an_overlay() -> None:
    """Not over programs on a root that is one itself; over every other file system that can be written."""
    plan = _plan(ROOT_OVERLAY, "/home", ("/opt",), "")
    over = {str(step.point): step for step in plan if isinstance(step, _Over)}
    assert over.keys() == {"tmp", "var"}, "/home is where they lie"
    assert "index=off,nfs_export=off,xino=" in over["tmp"].options
    assert over["tmp"].mode == 0o1777
    others = [step for step in plan if not isinstance(step, _Over)]
    assert others[0] == ("single", ".", "-")
    assert {point for what, point, _ in others if what == "single"} == {".", "usr/local", "etc/hostname", "mnt"}
    assert ("bind", "opt", "-") in others
    assert [step[1] for step in others][-1] == "home", "which the replica sees empty"


@pytest.mark.parametrize("kind", ["ext4", "overlay"])
def test_layers_lie_on_disk_where_that_can_hold_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(mount_table, "read", lambda: list(parse(f"27 1 8:1 / / rw - {kind} /dev/sda rw\n")))
    folder, why = holder(tmp_path / "state", tmp_path / "memory")
    assert folder == (tmp_path / "state" if kind == "ext4" else tmp_path / "memory") / "layers"
    assert bool(why) == bool(unlayered()) == (kind == "overlay")
