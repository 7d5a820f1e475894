"""What goes wrong: kill -9 of server, writer and reader at every step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from zerowake_proto import gpumem_pb2 as pb

from gpumem.client import Client
from gpumem.wire.errors import NotFound, PeerGone
from tests.worlds.gpumem_peer import go_on, peer, step
from tests.worlds.gpumem_server import MIB, Served, Weights, make_weights, served, until
from tests.worlds.processes import alive


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
            if at == "filled":
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
