"""Another agent as a source: read, given up, refused, gone."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from restore_agent.transfer.layout import chunk_key, manifest_key, name_key
from restore_agent.transfer.peer import Peers
from restore_agent.transfer.source import Absent, Altered, Denied, TransferError, Unreachable
from tests.worlds.certificates import Authority
from tests.worlds.peers import DIGEST, MANIFEST, NAMESPACE, fleet_files, make_chunks, offered, read, read_key, served
from tests.worlds.waiting import until
from zerowake_shared.tls import TlsFiles, client_contexts, server_context

FLEET = Authority("fleet")


@pytest.fixture
def tls(tmp_path: Path) -> TlsFiles:
    return fleet_files(tmp_path / "tls", FLEET)


@pytest.fixture
def peers(tls: TlsFiles) -> Iterator[Peers]:
    with Peers(client_contexts(tls)) as peers:
        yield peers


async def test_many_chunks_at_a_time(tmp_path: Path, tls: TlsFiles, peers: Peers) -> None:
    chunks = make_chunks(tmp_path, 20, (3 << 20) + 7)
    with served(tls, offered(tmp_path, chunks)) as one:
        peer = peers.peer(one.address, NAMESPACE, DIGEST)
        assert await read_key(peer, manifest_key(DIGEST)) == MANIFEST
        got = await asyncio.gather(*(read(peer, chunk) for chunk in chunks))
        assert got == [(tmp_path / chunk.hash).read_bytes() for chunk in chunks]
        assert await peer.size(chunk_key(chunks[0].hash)) == (3 << 20) + 7


async def test_a_range_and_what_is_behind_the_end(tmp_path: Path, tls: TlsFiles, peers: Peers) -> None:
    [chunk] = make_chunks(tmp_path, 1, 1000)
    with served(tls, offered(tmp_path, [chunk])) as one:
        peer = peers.peer(one.address, NAMESPACE, DIGEST)
        whole = (tmp_path / chunk.hash).read_bytes()
        assert await read_key(peer, chunk_key(chunk.hash), 100, 900) == whole[900:]
        assert await read_key(peer, chunk_key(chunk.hash), 100, 950) == whole[950:]
        assert await read_key(peer, chunk_key(chunk.hash), 100, 1000) == b""


async def test_denied_and_absent_are_two_words_and_no_fault_of_the_peer(tmp_path: Path, tls: TlsFiles, peers: Peers) -> None:
    chunks = make_chunks(tmp_path, 2)
    with served(tls, offered(tmp_path, chunks[:1])) as one:
        peer = peers.peer(one.address, NAMESPACE, DIGEST)
        with pytest.raises(Denied, match=f"agent {one.address}: snapshot {DIGEST[:12]} of namespace {NAMESPACE} has no chunks/"):
            await read(peer, chunks[1])
        with pytest.raises(Denied, match=r"has no names/"):
            await read_key(peer, name_key(NAMESPACE, "chat"))
        with pytest.raises(Denied, match=r"it does not let us"):  # no words come with a HEAD
            await peer.size(name_key(NAMESPACE, "chat"))
        with pytest.raises(Denied, match=r"is not of namespace others"):
            await read(peers.peer(one.address, "others", DIGEST), chunks[0])
        with pytest.raises(Absent, match=r"this node has no snapshot 0000"):
            await read(peers.peer(one.address, NAMESPACE, "0" * 64), chunks[0])
        assert await read(peer, chunks[0])


async def test_a_chunk_on_its_way_there_is_waited_for(tmp_path: Path, tls: TlsFiles, peers: Peers) -> None:
    [chunk] = make_chunks(tmp_path / "elsewhere", 1)
    one = offered(tmp_path, [chunk])
    with served(tls, one) as there:
        impatient = peers.peer(there.address, NAMESPACE, DIGEST)
        with pytest.raises(Absent, match=r"has not come to this node yet"):
            await read(impatient, chunk)
        reading = asyncio.create_task(read(peers.peer(there.address, NAMESPACE, DIGEST, patience=19), chunk))
        await until(lambda: any(thread.name == "peer" for thread in threading.enumerate()), "the request")
        one.arrived(chunk, tmp_path / "elsewhere" / chunk.hash)
        assert await reading == (tmp_path / "elsewhere" / chunk.hash).read_bytes()


async def test_one_that_is_gone_is_named(tmp_path: Path, tls: TlsFiles, peers: Peers) -> None:
    [chunk] = make_chunks(tmp_path, 1)
    with served(tls, offered(tmp_path, [chunk])) as one:
        peer = peers.peer(one.address, NAMESPACE, DIGEST)
        assert await read(peer, chunk)
    with pytest.raises(Unreachable, match=f"{peer}: Connection refused"):
        await read(peer, chunk)


async def test_a_kept_connection_that_the_other_side_has_closed_is_made_anew(tmp_path: Path, tls: TlsFiles, peers: Peers) -> None:
    [chunk] = make_chunks(tmp_path, 1)
    here = offered(tmp_path, [chunk])
    with served(tls, here) as one:
        peer = peers.peer(one.address, NAMESPACE, DIGEST)
        assert await read(peer, chunk)
        with one.server._lock:
            connections = list(one.server._connections)
        for connection in connections:
            connection.shutdown(socket.SHUT_RDWR)
        assert await read(peer, chunk)


async def test_one_that_ends_in_the_middle(tmp_path: Path, tls: TlsFiles, peers: Peers) -> None:
    [chunk] = make_chunks(tmp_path, 1, 3 << 20)
    with served(tls, offered(tmp_path, [chunk]), rate=2 << 20) as one:
        peer = peers.peer(one.address, NAMESPACE, DIGEST)
        pieces = aiter(peer.read(chunk_key(chunk.hash), 0, chunk.size))
        await anext(pieces)
        closing = threading.Thread(target=one.server._close)
        closing.start()
        with pytest.raises(Unreachable, match=r"ended in the middle|broke off|[Cc]onnection"):
            while True:
                await anext(pieces)
        closing.join()


async def test_one_that_is_given_up_ends_at_once(tmp_path: Path, tls: TlsFiles, peers: Peers) -> None:
    [chunk] = make_chunks(tmp_path, 1, 3 << 20)
    with served(tls, offered(tmp_path, [chunk]), rate=1.0) as one:
        peer = peers.peer(one.address, NAMESPACE, DIGEST)
        reading = asyncio.create_task(read(peer, chunk))
        await until(lambda: one.egress.sent, "the first piece")
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await until(lambda: not peer._line._all, "its connection is gone")


async def test_an_agent_of_another_fleet_is_not_taken_for_one(tmp_path: Path, tls: TlsFiles, peers: Peers) -> None:
    strangers = Authority("strangers")
    strange = fleet_files(tmp_path / "strange", strangers)
    with served(strange, offered(tmp_path, [])) as one, pytest.raises(Denied, match=r"its certificate is none of the fleet's"):
        await read_key(peers.peer(one.address, NAMESPACE, DIGEST), manifest_key(DIGEST))


async def test_an_agent_that_does_not_take_our_certificate_has_denied_us(tmp_path: Path, tls: TlsFiles) -> None:
    ours = fleet_files(tmp_path / "ours", Authority("strangers"))
    (tmp_path / "ours/ca.crt").write_bytes(FLEET.certificate)
    refused = pytest.raises((Denied, Unreachable), match=r"does not take our certificate|reset|broke off|[Bb]roken")
    with served(tls, offered(tmp_path, [])) as one, Peers(client_contexts(ours)) as peers, refused:
        await read_key(peers.peer(one.address, NAMESPACE, DIGEST), manifest_key(DIGEST))


async def test_one_that_says_nothing_is_left_when_the_block_ends(tls: TlsFiles) -> None:
    """A handshake that is never answered holds a thread until it is interrupted."""
    with socket.create_server(("127.0.0.1", 0)) as listener, Peers(client_contexts(tls)) as peers:
        reading = asyncio.create_task(read_key(peers.peer(f"127.0.0.1:{listener.getsockname()[1]}", NAMESPACE, DIGEST), "x"))
        with contextlib.closing((await asyncio.to_thread(listener.accept))[0]):
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading


def test_a_server_of_the_wrong_name_is_refused(tmp_path: Path, tls: TlsFiles) -> None:
    scaler = fleet_files(tmp_path / "scaler", FLEET, "zerowake-scaler")
    refused = pytest.raises(Denied, match=r"none of the fleet's")
    with served(scaler, offered(tmp_path, [])) as one, Peers(client_contexts(tls)) as peers, refused:
        asyncio.run(read_key(peers.peer(one.address, NAMESPACE, DIGEST), manifest_key(DIGEST)))


def test_what_is_no_address_is_said_to_be_none(tls: TlsFiles) -> None:
    with Peers(client_contexts(tls)) as peers, pytest.raises(ValueError, match=r"is not HOST:PORT"):
        peers.peer("nowhere", NAMESPACE, DIGEST)


@contextlib.contextmanager
def saying(tls: TlsFiles, answer: bytes) -> Iterator[str]:
    """The address of an agent that gives this answer to whatever it is asked, once."""

    def serve() -> None:
        with contextlib.suppress(OSError), server_context(tls).wrap_socket(listener.accept()[0], server_side=True) as connection:
            connection.recv(4096)
            connection.sendall(answer)
            connection.recv(1)  # until the reader has gone

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=serve)
        serving.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        serving.join()


@pytest.mark.parametrize(
    ("head", "error", "why"),
    [
        (b"Content-Length: 999999999999\r\n", Altered, "begins to send 999999999999 bytes, and was asked for 100"),
        (b"Content-Length: -1\r\n", Unreachable, "is none of HTTP's"),
        (b"Content-Length: many\r\n", Unreachable, "is none of HTTP's"),
        (b"Transfer-Encoding: chunked\r\n", Unreachable, "is none of HTTP's"),
        (b"", Unreachable, "does not say how long its answer is"),
    ],
)
async def test_an_answer_of_another_length_than_was_asked_for_is_not_read(
    tls: TlsFiles, peers: Peers, head: bytes, error: type[TransferError], why: str
) -> None:
    with saying(tls, b"HTTP/1.1 200 OK\r\n" + head + b"\r\nbytes without an end") as address, pytest.raises(error, match=why):
        await read_key(peers.peer(address, NAMESPACE, DIGEST), chunk_key("ab" * 32), 100)
