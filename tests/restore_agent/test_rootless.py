"""The machine itself as a place: an engine starts and ends in it, one for each port, and takes no part in snapshots."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from restore_agent.engine.engine import Engine
from restore_agent.places.place import Place, PlaceError
from restore_agent.places.rootless import Rootless
from restore_agent.snapshots.compatibility import node_fits
from restore_agent.snapshots.file_hashes import FileHashes
from restore_agent.snapshots.manifest import EngineRecord
from tests.worlds.processes import alive
from tests.worlds.waiting import until

SERVER = "import http.server as h, sys; h.ThreadingHTTPServer(('', int(sys.argv[1])), h.SimpleHTTPRequestHandler).serve_forever()"


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    yield number


async def test_an_engine_lives_and_ends_in_it(port: int) -> None:
    place: Place = await Rootless.create(port)
    record = EngineRecord(
        command=(sys.executable, "-c", SERVER, str(port)), env=dict(os.environ), directory="/srv", port=port, health_path="/"
    )
    engine = await Engine.start(record, place, place.output("tiny"), for_snapshot=False)
    await engine.wait_healthy()
    assert place.host_pids() == {engine.pid: engine.pid}
    assert (place.route.host, place.route.netns) == ("127.0.0.1", "")
    await place.close()
    assert not alive(engine.pid)
    assert os.WIFSIGNALED(await asyncio.wait_for(place.exit_of(engine.pid), 10))
    engine.output.close()


async def test_its_whole_process_group_ends_with_it(port: int, tmp_path: Path) -> None:
    place = await Rootless.create(port)
    note = tmp_path / "pid"
    output = place.output("tiny")
    with output.writers() as fds:
        await place.spawn(["sh", "-c", f"sleep 1000 & echo $! >{note}; wait"], dict(os.environ), "/", fds, engine=True)
    await until(lambda: note.exists() and note.read_text().strip())
    await place.close()
    await until(lambda: not alive(int(note.read_text())), "the whole group has ended")  # it was told to; the kernel takes its time
    output.close()


async def test_an_exit_code_is_a_wait_status(port: int) -> None:
    async with await Rootless.create(port) as place:
        output = place.output("tiny")
        with output.writers() as fds:
            pid = await place.spawn(["sh", "-c", "exit 4"], dict(os.environ), "/", fds, engine=True)
        assert os.waitstatus_to_exitcode(await asyncio.wait_for(asyncio.shield(place.exit_of(pid)), 10)) == 4
        output.close()


async def test_a_port_has_one_engine(port: int) -> None:
    async with await Rootless.create(port):
        with pytest.raises(PlaceError, match=f"port {port} is taken"):
            await Rootless.create(port)
    async with await Rootless.create(port):
        pass
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(PlaceError, match=f"port {port} is taken"):
            await Rootless.create(port)


async def test_a_program_that_is_not_there_is_named(port: int) -> None:
    async with await Rootless.create(port) as place:
        with pytest.raises(PlaceError, match="cannot start /no/such/program: No such file"):
            await place.spawn(["/no/such/program"], {}, "/", [1, 2])


async def test_it_takes_no_part_in_snapshots(port: int, tmp_path: Path) -> None:
    async with await Rootless.create(port) as place:
        with pytest.raises(PlaceError, match="as root"):
            _ = place.control_directory
        with pytest.raises(PlaceError, match="as root"):
            await place.carried(tmp_path)
        with pytest.raises(PlaceError, match="as root"):
            await place.lay_out(tmp_path)
        with pytest.raises(PlaceError, match="as root"):
            await place.complete(tmp_path, node_fits("4.2.1", [], None), FileHashes())
        with pytest.raises(PlaceError, match="as root"):
            place.mapped_files([])
