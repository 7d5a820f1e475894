"""What goes wrong: kill -9 of server, writer and reader at every step, no more descriptors, and a crowd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from zerowake_proto import gpumem_pb2 as pb

from gpumem.client import Client
from gpumem.client.control import Control
from gpumem.wire.blocking_connection import BlockingConnection
from gpumem.wire.errors import GpumemError, NotFound, PeerGone
from gpumem.wire.frames import VERSION, receive, send
from tests.worlds.gpumem_peer import go_on, peer, step
from tests.worlds.gpumem_server import GPUMEM, MIB, Served, Weights, make_weights, served, until
from tests.worlds.processes import alive, descriptors


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as found:
        yield found


WRITER = ("connected", "begun", "half written", "written", "sealed")
READER = ("connected", "attached", "quiesced", "resumed")


@pytest.mark.parametrize("at", WRITER)
def test_a_writer_killed_leaves_nothing_unless_it_has_sealed(server: Served, at: str) -> None:
    key = os.urandom(32)
    with peer(server.socket, "write", key, str(10 * MIB)) as writer:
        capability = b""
        line = step(writer)
        while not line.startswith(at):
            line = go_on(writer)
            if line.startswith("begun"):
                capability = bytes.fromhex(line.split()[1])
        writer.kill()
    until(lambda: not server.status().leases)
    with Client(server.socket) as client:
        if at == "sealed":
            assert bytes(client.attach(key, capability).view()) == b"w" * 10 * MIB
        else:
            with pytest.raises(NotFound):
                client.attach(key, capability)
            until(lambda: server.host.free_bytes == server.host.wanted_bytes)


@pytest.mark.parametrize("at", READER)
def test_a_reader_killed_gives_back_its_lease_and_no_more(server: Served, weights: Weights, at: str) -> None:
    with Client(server.socket) as client:
        client.fill(weights.layout, weights.sources)
        region = client.attach(weights.id)
        with peer(server.socket, "read", weights.id) as reader:
            line = step(reader)
            while not line.startswith(at):
                line = go_on(reader)
            reader.kill()
        until(lambda: len(server.status().leases) == 1)
        assert server.status().regions[0].leases == 1
        assert region.view() == weights.data


def test_who_waits_for_a_region_may_be_killed(server: Served, weights: Weights) -> None:
    connections = server.status().connections
    with peer(server.socket, "wait", weights.id) as waiting:
        step(waiting)
        assert waiting.stdin is not None
        waiting.stdin.write("\n")
        waiting.stdin.flush()
        until(lambda: server.status().connections == connections + 1)
        waiting.kill()
    until(lambda: server.status().connections == connections)


@pytest.mark.parametrize("at", ["idle", "read", "written", "scratch", "filled", "waited for"])
def test_a_server_killed_takes_nobody_with_it(tmp_path: Path, pool: ThreadPoolExecutor, at: str) -> None:
    """What is mapped stays valid; the next server starts where it was, and a client resumes with it."""
    weights = make_weights(tmp_path / "weights", 10 * MIB)
    with served(tmp_path, 64 * MIB, arena=16 * MIB) as first, Client(first.socket) as client:
        client.fill(weights.layout, weights.sources)
        region = client.attach(weights.id)
        filler = first.filler()
        doing = written = None
        if at == "written":
            written = client.begin(b"w" * 32, pb.Layout(size=5 * MIB))
            written.view()[:] = b"x" * 5 * MIB
        elif at == "scratch":
            client.scratch(4 * MIB).view()[:] = b"x" * 4 * MIB
        elif at == "filled":
            other = make_weights(tmp_path / "other", 10 * MIB)
            os.kill(filler, signal.SIGSTOP)
            doing = pool.submit(client.fill, other.layout, other.sources)
            until(lambda: bool(first.status().fills))
        elif at == "waited for":
            doing = pool.submit(client.attach, b"n" * 32, wait=60)
        first.kill()
        if doing is not None:
            os.kill(filler, signal.SIGCONT)
            with pytest.raises(PeerGone):
                doing.result(10)
        assert region.view() == weights.data
        until(lambda: not alive(filler))
        with served(tmp_path, 64 * MIB, arena=16 * MIB) as second:
            assert second.host.free_bytes == 64 * MIB
            with pytest.raises(PeerGone, match="stays valid"):
                client.attach(weights.id)
            with Client(second.socket) as other_client:
                other_client.fill(weights.layout, weights.sources)
            address = region.address
            if written is not None:
                written.close()  # what was never sealed is lost, and cannot be resumed
            client.resume()
            assert (region.address, bytes(region.view())) == (address, weights.data)
            assert len(second.status().leases) == (2 if at == "scratch" else 1)


def test_two_servers_do_not_share_a_socket(server: Served) -> None:
    second = subprocess.run([GPUMEM, "serve", "--socket", server.socket, "--reserve", "2M"], capture_output=True, text=True, check=False)
    assert (second.returncode, "another gpumem serves" in second.stderr) == (1, True)
    assert server.host.free_bytes == 192 * MIB


def test_tenants_find_the_next_server_where_the_last_was(tmp_path: Path) -> None:
    with served(tmp_path, 4 * MIB) as first:
        connection = BlockingConnection(first.socket, "operator")
        path = Path(connection.ask(pb.Request(tenant=pb.Tenant(namespace="red")))[0].tenant.path)
        connection.close()
        assert path.parent.parent.stat().st_mode & 0o777 == 0o700
        first.kill()
    with served(tmp_path, 4 * MIB), Client(path) as client:
        assert client._connection.welcome.namespace == "red"


def test_no_more_descriptors(tmp_path: Path, weights: Weights) -> None:
    """A server at its limit turns away who comes next, serves who is there, and recovers."""
    with served(tmp_path, 96 * MIB, open_files=100) as server, Client(server.socket) as client:
        client.fill(weights.layout, weights.sources)
        crowd = []
        turned_away = 0
        for _ in range(150):
            try:
                crowd.append(BlockingConnection(server.socket, "crowd"))
            except PeerGone:
                turned_away += 1
        assert turned_away >= 50
        file = weights.path.open()
        full = crowd[0]
        with pytest.raises(GpumemError), contextlib.suppress(OSError):
            full.ask(pb.Request(fill=pb.Fill(layout=weights.layout, device="host")), [file.fileno()] * 50)
        with contextlib.suppress(GpumemError):
            client.attach(weights.id)  # it may be lent or refused, in words
        for connection in crowd:
            connection.close()
        until(lambda: server.status().connections <= 2)
        assert client._connection.open
        assert client.attach(weights.id).view() == weights.data
        assert client.scratch(2 * MIB).size == 2 * MIB
        assert alive(server.process.pid)


@pytest.mark.usefixtures("no_garbage")
def test_a_crowd_of_readers(server: Served, weights: Weights, pool: ThreadPoolExecutor) -> None:
    """1,000 clients, each with its own connection and mapping, at once; then all gone without a word."""
    with Client(server.socket) as client:
        client.fill(weights.layout, weights.sources)
    before = len(descriptors(os.getpid()))
    everybody: list[Client] = []

    def come(number: int) -> None:
        found = Client(server.socket, label=f"reader {number}")
        assert found.attach(weights.id).view()[-100:] == weights.data[-100:]
        everybody.append(found)

    list(pool.map(come, range(1000)))
    status = server.status()
    assert (len(status.leases), status.regions[0].leases) == (1000, 1000)
    for client in everybody:
        client._connection.close()
    until(lambda: not server.status().leases)
    for client in everybody:
        client.close()
    assert len(descriptors(os.getpid())) == before


async def test_a_crowd_of_tasks(server: Served, weights: Weights) -> None:
    async with contextlib.AsyncExitStack() as stack:
        controls = [await stack.enter_async_context(Control.connected(server.socket)) for _ in range(100)]
        filled = await asyncio.gather(*(control.fill(weights.layout, weights.sources, "host") for control in controls))
        assert sum(found.from_files for found in filled) == len(weights.data)


def test_who_does_not_read_answers_keeps_nobody_waiting(server: Served, weights: Weights) -> None:
    with Client(server.socket) as client:
        client.fill(weights.layout, weights.sources)
        deaf = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(20)]
        for connection in deaf:
            connection.connect(str(server.socket))
            connection.setblocking(False)
            send(connection, pb.Request(id=1, hello=pb.Hello(version=VERSION)).SerializeToString())
            with contextlib.suppress(BlockingIOError, OSError):
                for number in range(2, 60):
                    send(connection, pb.Request(id=number, attach=pb.Attach(region=weights.ref())).SerializeToString())
        assert client.attach(weights.id).view() == weights.data
        for connection in deaf:
            connection.close()
    until(lambda: not server.status().leases)


def test_too_many_requests_at_once_end_the_connection(server: Served) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as greedy:
        greedy.settimeout(10)
        greedy.connect(str(server.socket))
        send(greedy, pb.Request(id=1, hello=pb.Hello(version=VERSION)).SerializeToString())
        receive(greedy)
        waiting = pb.Attach(region=pb.RegionRef(device="host", id=b"n" * 32), wait_seconds=100)
        with contextlib.suppress(ConnectionError):
            for number in range(2, 100):
                send(greedy, pb.Request(id=number, attach=waiting).SerializeToString())
        # With requests unread at the server, the kernel may drop its word on why.
        with pytest.raises((EOFError, ConnectionError)):
            while True:
                assert "more than 64" in pb.Reply.FromString(receive(greedy).payload).error.message
