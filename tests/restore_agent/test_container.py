"""Restoring into containers that runc made: a real CRIU, real cgroups, and a tenant inside who means no good."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.engine.engine import Engine
from restore_agent.places.container import Container
from restore_agent.places.container_error import ContainerError
from restore_agent.places.place import Route
from restore_agent.places.placeholder import SOCKET
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.node import Node
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.replicas import NoReplica, State
from restore_agent.snapshots.catalog import Snapshot
from tests.worlds.agent import PORT
from tests.worlds.captured import ADDRESS, IMAGE, a_node, answer_of, nothing, request, rights
from tests.worlds.containers import CAPABILITIES, Callers, Running, answering, container
from tests.worlds.image import MAPPED, PYTHON, SERVER
from tests.worlds.waiting import until

pytestmark = pytest.mark.usefixtures("needs_criu", "needs_runc")


@pytest.fixture(scope="session")
def command() -> list[str]:
    """The server of hashing_engine.py, started by a shell that changes the container's file system first."""
    server = f"{PYTHON} {SERVER} {PORT} 8 {MAPPED} --child"
    return ["/bin/sh", "-c", f"echo written >/etc/zerowake-test && rm /etc/issue && exec {server}"]


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory, command: list[str], needs_criu: None, needs_runc: None) -> tuple[Path, str]:
    """A state folder with a snapshot that was taken, and proved, in a container; and what its engine answered."""
    folder = tmp_path_factory.mktemp("containers")

    async def take() -> str:
        async with a_node(folder) as node, answering(folder / "bin") as callers, container(folder / "one", folder / "bin"):
            place = Container(await callers.next(), IMAGE, [ADDRESS])
            captured = await node.capture(request(command), nothing, Phases(), place.open)
            assert captured.snapshot.manifest.canary
            assert not place.placeholder.ended.done(), "the container waits again"
            await place.close()
            return captured.snapshot.manifest.canary.answer

    answer = asyncio.run(take())
    return folder, answer


@pytest.fixture
async def node(taken: tuple[Path, str], tmp_path: Path) -> AsyncIterator[Node]:
    shutil.copytree(taken[0] / "state", tmp_path / "state", symlinks=True)
    async with a_node(tmp_path) as node:
        yield node


def snapshot_of(node: Node) -> Snapshot:
    return node.store.get("team", "small")


async def test_the_process_that_was_dumped_comes_back_in_another_container(
    node: Node, callers: Callers, tmp_path: Path, taken: tuple[Path, str]
) -> None:
    async with container(tmp_path / "two", callers.folder, memory=1 << 30) as two:
        place = Container(await callers.next(), IMAGE, [ADDRESS])
        replica = await node.restore_into(place, "small", snapshot_of(node), Phases())
        assert await answer_of(replica.engine) == json.loads(taken[1])
        assert replica.engine.place.route == Route(ADDRESS)
        # Under the container's limits, in its namespaces, with its rights, the same pids, its pid 1 as their parent.
        hosts = place.host_pids()
        assert {process.pid for process in snapshot_of(node).manifest.processes} <= hosts.keys()
        for pid, host in hosts.items():
            groups = Path(f"/proc/{host}/cgroup").read_text()
            assert groups == Path(f"/proc/{place.pid}/cgroup").read_text(), pid
            for kind in ("pid", "mnt", "net", "ipc", "uts", "cgroup"):
                assert Path(f"/proc/{host}/ns/{kind}").readlink() == Path(f"/proc/{place.pid}/ns/{kind}").readlink()
            assert rights(host) == rights(place.pid)
        assert "Seccomp:\t2" in rights(place.pid)
        assert max(len(list(Path(f"/proc/{host}/task").iterdir())) for host in hosts.values()) > 1, "an engine has threads"
        assert f"PPid:\t{place.pid}\n" in Path(f"/proc/{hosts[replica.engine.pid]}/status").read_text()
        assert charged(two) > 8 << 20, "what was filled is charged to the container"
        # What the engine had changed in its file system.
        assert two.execute("cat", "/etc/zerowake-test") == "written\n"
        gone = (two.upper / "etc/issue").lstat()
        assert stat.S_ISCHR(gone.st_mode)
        assert gone.st_rdev == 0
        # It prints where the container prints, and its end is the container's.
        await answer_of(replica.engine, "/count")
        with contextlib.suppress(Exception):
            await answer_of(replica.engine, "/exit")
        assert await two.exit_code() == 3
        assert "/count" in two.log()
    await asyncio.wait_for(gone_from(node), 10)


def charged(running: Running) -> int:
    stats = json.loads(running.run("events", "--stats", running.name).stdout)
    return int(stats["data"]["memory"]["usage"]["usage"])


async def gone_from(node: Node) -> None:
    while len(node.replicas):
        await asyncio.sleep(0.01)  # its watcher takes it down


async def test_signals_go_to_the_engine(node: Node, callers: Callers, tmp_path: Path) -> None:
    async with container(tmp_path / "two", callers.folder) as two:
        place = Container(await callers.next(), IMAGE, [ADDRESS])
        await node.restore_into(place, "small", snapshot_of(node), Phases())
        two.kill("TERM")
        assert await two.exit_code() == 128 + 15


async def test_an_agent_that_has_many_files_open(node: Node, callers: Callers, tmp_path: Path, taken: tuple[Path, str]) -> None:
    """CRIU had a copy of the socket whose end is waited for, where its number was 100 or more."""
    async with container(tmp_path / "two", callers.folder):
        place = Container(await callers.next(), IMAGE, [ADDRESS])
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                stack.callback(os.close, os.open("/dev/null", os.O_RDONLY))
            phases = Phases()
            replica = await node.restore_into(place, "small", snapshot_of(node), phases)
        assert phases.total < 8
        assert await answer_of(replica.engine) == json.loads(taken[1])


async def test_a_replica_that_retires_goes_when_its_engine_has(node: Node, callers: Callers, tmp_path: Path) -> None:
    """And leaves no descriptor with the agent, which sees many pods in its life."""
    before = 0
    for number in range(3):
        async with container(tmp_path / f"c{number}", callers.folder) as running:
            replica = await node.restore_into(Container(await callers.next(), IMAGE, [ADDRESS]), "small", snapshot_of(node), Phases())
            with pytest.raises(NoReplica, match="Kubernetes' to end"):
                await node.release(replica.id)
            node.replicas.retire(replica.id, "its pod is being deleted")
            assert replica.state is State.RETIRING
            assert await answer_of(replica.engine), "it finishes what it has"
            running.kill("KILL")
            await running.exit_code()
            async with asyncio.timeout(20):
                while len(node.replicas):
                    await asyncio.sleep(0.02)
            assert replica.state is State.GONE
        count = len(list(Path("/proc/self/fd").iterdir()))
        assert not before or count <= before
        before = count


async def test_an_engine_outlives_its_agent(node: Node, callers: Callers, tmp_path: Path, taken: tuple[Path, str]) -> None:
    async with container(tmp_path / "two", callers.folder) as two:
        place = Container(await callers.next(), IMAGE, [ADDRESS])
        replica = await node.restore_into(place, "small", snapshot_of(node), Phases())
        place.let_go()
        again = await callers.next()
        assert (again.pid, again.engine) == (place.pid, replica.engine.pid), "it says whom it watches over"
        found = Container(again, IMAGE, [ADDRESS])
        found.take()
        engine = Engine(replica.engine.record, found, found.output("small"), again.engine)
        assert await answer_of(engine) == json.loads(taken[1])
        os.kill(found.host_pids()[engine.pid], 9)
        assert await asyncio.wait_for(asyncio.shield(found.exit_of(engine.pid)), 10) == 9
        assert await two.exit_code() == 137


async def test_what_cannot_be_restored_waits_again_and_is_as_it_was(
    node: Node, callers: Callers, tmp_path: Path, taken: tuple[Path, str]
) -> None:
    async with container(tmp_path / "two", callers.folder, ["sleep", "60"]) as two:
        place = Container(await callers.next(), IMAGE, [ADDRESS])
        inside = two.folder / "root" / MAPPED.relative_to("/")
        content = inside.read_bytes()
        inside.write_bytes(os.urandom(1 << 20))
        with pytest.raises(RestoreFailed, match=r"weights\.bin.*changed") as changed:
            await node.restore_into(place, "small", snapshot_of(node), Phases())
        assert changed.value.reason == "incompatible"
        assert not (two.folder / "root/etc/zerowake-test").exists(), "what was laid out is taken away"
        assert place.host_pids().keys() == {1}
        other = Container(place.placeholder, "sha256:another", [ADDRESS])
        with pytest.raises(RestoreFailed, match="taken of image sha256:0123"):
            await node.restore_into(other, "small", snapshot_of(node), Phases())
        inside.write_bytes(content)
        replica = await node.restore_into(place, "small", snapshot_of(node), Phases())
        assert await answer_of(replica.engine) == json.loads(taken[1])


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.06, 0.1])
async def test_a_restore_that_is_given_up_leaves_nothing(node: Node, callers: Callers, tmp_path: Path, delay: float) -> None:
    await node.stage(snapshot_of(node))
    async with container(tmp_path / "two", callers.folder):
        place = Container(await callers.next(), IMAGE, [ADDRESS])
        restoring = asyncio.create_task(node.restore_into(place, "small", snapshot_of(node), Phases()))
        await asyncio.wait([restoring], timeout=delay)
        restoring.cancel()
        done, _ = await asyncio.wait([restoring], timeout=20)
        assert done
        if restoring.cancelled():
            await until(lambda: place.host_pids().keys() == {1}, "the placeholder is alone: it reaps what was killed")
            await node.restore_into(place, "small", snapshot_of(node), Phases())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"capabilities": CAPABILITIES[1:]}, "capabilities 0"),
        ({"capabilities": [], "user": 1000}, "capabilities 0, 1, 3.*users 0; groups 0"),
    ],
)
async def test_nothing_comes_back_with_more_rights_than_the_container(
    node: Node, callers: Callers, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    async with container(tmp_path / "two", callers.folder, **options):  # type: ignore[arg-type]
        place = Container(await callers.next(), IMAGE, [ADDRESS])
        with pytest.raises(RestoreFailed, match=words) as refused:
            await node.restore_into(place, "small", snapshot_of(node), Phases())
        assert refused.value.reason == "incompatible"


async def test_a_snapshot_of_a_container_goes_nowhere_else(node: Node) -> None:
    with pytest.raises(RestoreFailed, match="into pods only"):
        await node.restorer.restore(snapshot_of(node), Phases())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared": ["network"]}, "shares the node's net namespace"),
        ({"shared": ["ipc", "uts"]}, "shares the node's ipc, uts namespace"),
        ({"capabilities": [*CAPABILITIES, "CAP_SYS_ADMIN"]}, "rights over the node"),
    ],
)
async def test_a_container_with_access_to_the_node_is_refused(
    callers: Callers, tmp_path: Path, options: dict[str, list[str]], message: str
) -> None:
    async with container(tmp_path / "two", callers.folder, **options):  # type: ignore[arg-type]
        with pytest.raises(ContainerError, match=message):
            await Container(await callers.next(), IMAGE, [ADDRESS]).open()


async def test_a_process_of_a_tenant_is_no_placeholder(callers: Callers, tmp_path: Path) -> None:
    """It can reach the socket as well; the kernel says that it is not pid 1."""
    async with container(tmp_path / "two", callers.folder) as two:
        real = await callers.next()
        says = "hello\\0waiting\\x000\\x001\\0true\\0"
        lies = f"import socket,time; s=socket.socket(1,5); s.connect('/run/zerowake/bin/{SOCKET}'); s.send(b'{says}'); time.sleep(60)"
        liar = await asyncio.create_subprocess_exec("runc", "exec", two.name, str(PYTHON), "-c", lies)
        false = await callers.next()
        assert false.pid != real.pid
        with pytest.raises(ContainerError, match="not pid 1"):
            await Container(false, IMAGE, [ADDRESS]).open()
    await asyncio.wait_for(liar.wait(), 10)  # it goes with the container


async def test_links_of_a_tenant_lead_nowhere(node: Node, callers: Callers, tmp_path: Path) -> None:
    """Into the control directory, and where changes are laid out: files of the node are neither read nor written."""
    victim = tmp_path / "victim"
    victim.write_text("the node's")
    async with container(tmp_path / "two", callers.folder) as two:
        place = await Container(await callers.next(), IMAGE, [ADDRESS]).open()
        control = two.folder / "control"
        for word in (".restore-complete", ".gpus.json", "ready-for-snapshot"):
            (control / word).symlink_to(victim)
        engine = Engine(snapshot_of(node).manifest.engine, place, place.output("small"), 1000)
        engine.woken({"GPU-1": "GPU-2"})
        assert (control / "restore-complete").is_file()
        with contextlib.suppress(OSError):
            assert not engine.is_ready
        (control / "weights.json").write_text('{"directories": ["/etc/weights"]}')
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / "model.safetensors").touch()
        two.execute("ln", "-s", str(tmp_path / "theirs"), "/etc/weights")
        with pytest.raises(ContainerError, match="/etc/weights of the container cannot be read: No such file"):
            await place.checkpoint(next(iter(engine.named_weights())), tmp_path / "weights")
        await place.close()
        two.execute("sh", "-c", f"ln -s {victim} /etc/zerowake-test")
        await node.restore_into(place, "small", snapshot_of(node), Phases())
        assert two.execute("cat", "/etc/zerowake-test") == "written\n", "the link was replaced"
    assert victim.read_text() == "the node's"


async def test_what_was_written_is_not_laid_out_where_nothing_can_be(node: Node, callers: Callers, tmp_path: Path) -> None:
    async with container(tmp_path / "two", callers.folder, read_only=True):
        with pytest.raises(RestoreFailed, match=r"has written /etc.*, and the root of this container is read-only"):
            await node.restore_into(Container(await callers.next(), IMAGE, [ADDRESS]), "small", snapshot_of(node), Phases())
