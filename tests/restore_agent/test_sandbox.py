"""A sandbox: namespaces of its own, programs in them, files that travel with a snapshot, and an end that takes everything along."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.pages.images import write_open_files
from restore_agent.places.place import Output, Place, PlaceError, describe_exit
from restore_agent.places.sandbox import Sandbox
from restore_agent.snapshots.compatibility import node_fits
from restore_agent.snapshots.file_hashes import FileHashes
from restore_agent.snapshots.manifest import CONTAINER_FILE
from tests.worlds import refused_calls
from tests.worlds.exhausted import descriptors_left
from tests.worlds.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces")


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with await Sandbox.create(tmp_path / "criu.kdat") as sandbox:
        yield sandbox


@pytest.fixture
async def output(sandbox: Sandbox) -> AsyncIterator[Output]:
    output = sandbox.output("test")
    yield output
    output.close()


async def run(place: Place, output: Output, *command: str, engine: bool = False) -> int:
    with output.writers() as fds:
        return await place.spawn(list(command), {"PATH": os.environ["PATH"]}, "/", fds, engine=engine)


async def status(place: Place, pid: int) -> int:
    return await asyncio.wait_for(asyncio.shield(place.exit_of(pid)), 10)


async def test_one_that_cannot_be_begun_for_want_of_descriptors_leaves_no_layer(tmp_path: Path) -> None:
    layers, refused = tmp_path / "layers", 0
    for left in range(1, 40):
        with descriptors_left(left):
            try:
                sandbox = await Sandbox.create(tmp_path / "criu.kdat", layers)
            except (PlaceError, OSError) as error:
                refused += 1
                assert "open files" in str(error), error
                continue
        await sandbox.close()
        break
    assert refused > 1
    assert list(layers.iterdir()) == []


async def test_its_namespaces_are_its_own(sandbox: Sandbox, output: Output) -> None:
    pid = await run(sandbox, output, "sleep", "1000")
    hosts = sandbox.host_pids()
    assert hosts.keys() == {1, pid}
    for kind in ("pid", "mnt", "net", "ipc"):
        assert Path(f"/proc/{hosts[pid]}/ns/{kind}").readlink() == Path(f"/proc/{sandbox.pid}/ns/{kind}").readlink()
        assert Path(f"/proc/{hosts[pid]}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink()
    assert sandbox.route.netns == sandbox.netns == f"/proc/{sandbox.pid}/ns/net"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the calls' numbers are of x86_64")
async def test_engines_are_refused_what_a_dump_cannot_carry_and_other_programs_are_not(sandbox: Sandbox) -> None:
    got: dict[bool, dict[str, int]] = {}
    for engine in (True, False):
        output = sandbox.output("test")
        pid = await run(sandbox, output, sys.executable, refused_calls.__file__, engine=engine)
        assert await status(sandbox, pid) == 0, output.tail()
        await until(lambda output=output: "{" in output.tail())  # type: ignore[misc]
        got[engine] = json.loads(output.tail().partition(": ")[2])
        output.close()
    assert got[True] == {str(call): refusal for call, refusal in refused_calls.REFUSED.items()} | {
        str(call): 0 for call in refused_calls.ALLOWED
    }
    assert got[False]["socket(2, 1, 262)"] == 0, "it was the filter, not the kernel"


@pytest.mark.parametrize(("command", "words"), [("exit 4", "exit code 4"), ("kill -SEGV $$", "killed by SIGSEGV")])
async def test_how_a_program_ended(sandbox: Sandbox, output: Output, command: str, words: str) -> None:
    pid = await run(sandbox, output, "sh", "-c", f"echo the last word; {command}", engine=True)
    assert describe_exit(await status(sandbox, pid)) == words
    await until(lambda: "test: the last word" in output.tail())


async def test_a_program_that_is_not_there(sandbox: Sandbox, output: Output) -> None:
    assert describe_exit(await status(sandbox, await run(sandbox, output, "/no/such/program"))).startswith("exit code")
    await until(lambda: "No such file" in output.tail())
    with pytest.raises(PlaceError, match="too large"):
        await sandbox.spawn(["true"], {"LARGE": "x" * (4 << 20)}, "/", [])
    with pytest.raises(PlaceError, match="NUL character in 'A=1"):
        await sandbox.spawn(["true"], {"A": "1\0B=2"}, "/", [])


async def test_an_environment_of_a_megabyte(sandbox: Sandbox, output: Output) -> None:
    env = {f"A{each}": "x" * 100_000 for each in range(11)} | {"PATH": "/usr/bin:/bin"}
    with output.writers() as fds:
        pid = await sandbox.spawn(["sh", "-c", "[ ${#A10} = 100000 ]"], env, "/", fds)
    assert describe_exit(await status(sandbox, pid)) == "exit code 0", output.tail()


async def test_what_it_keeps_in_memory_travels_and_its_sockets_do_not(sandbox: Sandbox, output: Output, tmp_path: Path) -> None:
    shm, run_ = sandbox.root / "dev/shm", sandbox.root / "run"
    (shm / "semaphore").write_bytes(b"\x01" * 32)
    (run_ / "lock").mkdir()
    (run_ / "lock" / "pid").write_text("7")
    os.mkfifo(shm / "pipe")
    (sandbox.control_directory / "ready-for-snapshot").touch()
    write_open_files(tmp_path, [])
    for name, content in (await sandbox.carried(tmp_path)).items():
        (tmp_path / name).write_bytes(content)
    async with await Sandbox.create(tmp_path / "criu.kdat") as other:
        await other.lay_out(tmp_path)
        await other.complete(tmp_path, node_fits("4.2.1", [], None), FileHashes())
        assert (other.root / "dev/shm/semaphore").read_bytes() == b"\x01" * 32
        assert (other.root / "run/lock/pid").read_text() == "7"
        assert (other.root / "dev/shm/pipe").is_fifo()
        assert list(other.control_directory.iterdir()) == []


async def test_one_that_has_kept_nothing_carries_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    write_open_files(tmp_path, [])
    assert await sandbox.carried(tmp_path) == {}
    await sandbox.lay_out(tmp_path)


async def test_what_was_taken_in_a_container_goes_nowhere_else(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / CONTAINER_FILE).write_text(json.dumps({"image": "sha256:0"}))
    with pytest.raises(PlaceError, match="into pods only"):
        await sandbox.lay_out(tmp_path)


async def test_its_end_is_the_end_of_all_that_is_in_it(sandbox: Sandbox, output: Output) -> None:
    pid = await run(sandbox, output, "sh", "-c", "trap '' TERM; sleep 1000 & wait")
    await until(lambda: len(sandbox.host_pids()) == 3)
    netns = Path(sandbox.netns)
    await sandbox.close()
    assert describe_exit(await status(sandbox, pid)) == "killed by SIGKILL"
    assert not netns.exists()
    assert sandbox.host_pids() == {}
    with pytest.raises(PlaceError, match=r"has ended \(closed by the agent\)"):
        await sandbox.spawn(["true"], {}, "/", [])
    await sandbox.close()


async def test_one_whose_init_is_killed_has_ended(sandbox: Sandbox, output: Output) -> None:
    pid = await run(sandbox, output, "sleep", "1000")
    os.kill(sandbox.pid, 9)
    assert describe_exit(await status(sandbox, pid)) == "killed by SIGKILL"
