"""The server as a whole: one a socket, namespaces apart, and nobody who takes all of it from the others."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from zerowake_proto import gpumem_pb2 as pb

from gpumem.client import Client
from gpumem.wire.blocking_connection import BlockingConnection
from gpumem.wire.errors import (
    Forbidden,
    GpumemError,
    Invalid,
    NotFound,
    OutOfMemory,
    PeerGone,
    VersionMismatch,
)
from gpumem.wire.frames import VERSION, receive, send
from tests.worlds.gpumem_server import GPUMEM, MIB, Served, Weights, served, until
from tests.worlds.processes import alive, descriptors


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as found:
        yield found


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


def test_another_version_is_told_so(server: Served) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as old:
        old.connect(str(server.socket))
        send(old, pb.Request(id=7, hello=pb.Hello(version=99)).SerializeToString())
        reply = pb.Reply.FromString(receive(old).payload)
        assert reply.error.reason == VersionMismatch.reason
        assert "99" in reply.error.message
        with pytest.raises(EOFError):
            receive(old)


def test_a_namespace_has_its_own_and_only_that(server: Served, client: Client, weights: Weights) -> None:
    connection = BlockingConnection(server.socket, "operator")

    def tenant(name: str) -> str:
        return connection.ask(pb.Request(tenant=pb.Tenant(namespace=name)))[0].tenant.path

    client.fill(weights.layout, weights.sources)
    with Client(tenant("red")) as red, Client(tenant("blue")) as blue:
        # What the operator filled is everybody's.
        assert blue.attach(weights.id).view() == weights.data
        own = pb.Layout.FromString(weights.layout)
        own.note = b"red's"
        with pytest.raises(NotFound, match="no source brings it"):
            blue.fill(own, [])  # it knows the hashes; the bytes it must have
        filled = red.fill(own, weights.sources)
        with pytest.raises(NotFound):
            blue.attach(filled.id)
        assert blue.attach(filled.id, filled.capability).view() == weights.data  # red told it
        with Client(tenant("red")) as other:
            assert other.attach(filled.id).view() == weights.data  # of the same namespace
        for request in (
            pb.Request(reserve=pb.Reserve(device="host", size=0)),
            pb.Request(quota=pb.Quota(namespace="red", size=0)),
            pb.Request(tenant=pb.Tenant(namespace="other")),
            pb.Request(evict=pb.Evict(region=weights.ref())),
        ):
            with pytest.raises(Forbidden):
                red._connection.ask(request)
        with pytest.raises(NotFound):
            blue._connection.ask(pb.Request(evict=pb.Evict(region=pb.RegionRef(device="host", id=filled.id))))
        seen = blue._connection.ask(pb.Request(status=pb.GetStatus()))[0].status
        assert not seen.regions
        assert {lease.namespace for lease in seen.leases} == {"blue"}
        connection.ask(pb.Request(quota=pb.Quota(namespace="red", size=40 * MIB)))
        with pytest.raises(OutOfMemory, match="quota of namespace red"):
            red.scratch(60 * MIB)
        assert red.scratch(2 * MIB).size == 2 * MIB
        connection.ask(pb.Request(quota=pb.Quota(namespace="red", size=0)))
    with pytest.raises(Invalid, match="Kubernetes"):
        tenant("../etc")
    with pytest.raises(Invalid, match=r"too long for a socket by .*shorter folder"):
        tenant("a" * 63)  # below a test's own folder
    connection.close()


def test_a_tenants_chunks_in_the_arena_are_its_own(server: Served, weights: Weights) -> None:
    """Who knows the hash of a chunk does not get its bytes; who brought it does."""
    connection = BlockingConnection(server.socket, "operator")
    red, blue = (Client(connection.ask(pb.Request(tenant=pb.Tenant(namespace=name)))[0].tenant.path) for name in ("red", "blue"))
    with contextlib.closing(connection), red, blue:
        red.fill(weights.layout, weights.sources, into_arena=True)
        with pytest.raises(NotFound, match="no source brings it"):
            blue.fill(weights.layout, [])
        assert red.fill(weights.layout, []).from_arena == len(weights.data)
        connection.ask(pb.Request(evict=pb.Evict(region=pb.RegionRef(device="host", id=weights.id))))
        red._connection.ask(pb.Request(evict=pb.Evict(region=pb.RegionRef(id=weights.id))))


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
