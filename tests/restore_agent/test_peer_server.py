"""A node's chunks over HTTP and TLS: what is answered to whom."""

import http.client
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from restore_agent.snapshots.chunks import Chunk
from restore_agent.transfer import peer_server
from restore_agent.transfer.layout import chunk_key, manifest_key
from restore_agent.transfer.offers import Offered
from restore_agent.transfer.peer_server import AGENT, PeerServer
from tests.worlds.certificates import Authority
from tests.worlds.exhausted import descriptors_left, no_threads
from tests.worlds.peers import DIGEST, MANIFEST, NAMESPACE, Served, fleet_files, make_chunks, offered, served
from tests.worlds.waiting import PATIENCE, blocking_until
from zerowake_shared.listening import CannotListen
from zerowake_shared.tls import TlsFiles, client_contexts, server_context

FLEET = Authority("fleet")


@pytest.fixture
def tls(tmp_path: Path) -> TlsFiles:
    return fleet_files(tmp_path / "tls", FLEET)


@contextmanager
def connected(to: Served, files: TlsFiles) -> Iterator[http.client.HTTPConnection]:
    raw = socket.create_connection(("127.0.0.1", to.server.port), PATIENCE)
    with client_contexts(files)().wrap_socket(raw, server_hostname=AGENT) as wrapped:
        connection = http.client.HTTPConnection("agent")
        connection.sock = wrapped
        yield connection


def ask(connection: http.client.HTTPConnection, key: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    connection.request(method, f"/{NAMESPACE}/{DIGEST}/{key}", headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_one_connection_asks_for_one_thing_after_another(tmp_path: Path, tls: TlsFiles) -> None:
    chunks = make_chunks(tmp_path / "chunks", size=700_001)
    with served(tls, offered(tmp_path / "chunks", chunks)) as one, connected(one, tls) as connection:
        assert ask(connection, manifest_key(DIGEST)) == (200, MANIFEST)
        for chunk in chunks:
            assert ask(connection, chunk_key(chunk.hash)) == (200, (tmp_path / "chunks" / chunk.hash).read_bytes())
        assert one.egress.sent == len(MANIFEST) + len(chunks) * 700_001


@pytest.mark.parametrize(
    ("ranged", "status", "first", "end"),
    [("bytes=0-0", 206, 0, 1), ("bytes=300-999", 206, 300, 1000), ("bytes=900-5000", 206, 900, 1000), ("lines=1-2", 206, 0, 1000)],
)
def test_a_range_is_a_part(tmp_path: Path, tls: TlsFiles, ranged: str, status: int, first: int, end: int) -> None:
    [chunk] = make_chunks(tmp_path, 1, 1000)
    with served(tls, offered(tmp_path, [chunk])) as one, connected(one, tls) as connection:
        assert ask(connection, chunk_key(chunk.hash), Range=ranged) == (status, (tmp_path / chunk.hash).read_bytes()[first:end])


def test_a_range_behind_the_end_is_said_to_be(tmp_path: Path, tls: TlsFiles) -> None:
    [chunk] = make_chunks(tmp_path, 1, 1000)
    with served(tls, offered(tmp_path, [chunk])) as one, connected(one, tls) as connection:
        assert ask(connection, chunk_key(chunk.hash), Range="bytes=1000-1001") == (416, b"it has 1000 bytes\n")
        assert ask(connection, chunk_key(chunk.hash), "HEAD") == (200, b"")


def test_what_may_not_be_had_is_forbidden_and_what_is_not_here_not_found(tmp_path: Path, tls: TlsFiles) -> None:
    chunks = make_chunks(tmp_path, 2)
    with served(tls, offered(tmp_path, chunks[:1])) as one, connected(one, tls) as connection:
        assert ask(connection, chunk_key(chunks[1].hash))[0] == 403
        connection.request("GET", f"/{NAMESPACE}/{'0' * 64}/{chunk_key(chunks[0].hash)}")
        assert connection.getresponse().read() == b"this node has no snapshot 000000000000\n"
        connection.request("GET", f"/others/{DIGEST}/{chunk_key(chunks[0].hash)}")
        answer = connection.getresponse()
        assert answer.status == 403
        answer.read()
        (tmp_path / chunks[0].hash).unlink()
        assert ask(connection, chunk_key(chunks[0].hash)) == (
            404,
            f"{chunk_key(chunks[0].hash)} of snapshot {DIGEST[:12]} is not on this node any more\n".encode(),
        )


def test_who_is_refused_is_named_in_the_log_once(tmp_path: Path, tls: TlsFiles, caplog: pytest.LogCaptureFixture) -> None:
    here, others = make_chunks(tmp_path, 1), make_chunks(tmp_path / "others", 3)
    with served(tls, offered(tmp_path, here)) as one, connected(one, tls) as connection:
        assert {ask(connection, chunk_key(chunk.hash))[0] for chunk in others} == {403}
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"127.0.0.1 is refused /{NAMESPACE}/{DIGEST}/{chunk_key(others[0].hash)}: snapshot {DIGEST[:12]} of namespace")


def test_nothing_can_be_written(tmp_path: Path, tls: TlsFiles) -> None:
    with served(tls, offered(tmp_path, [])) as one, connected(one, tls) as connection:
        assert ask(connection, manifest_key(DIGEST), "PUT")[0] == 405


@pytest.mark.parametrize("name", ["zerowake-scaler", "zerowake-agent.evil", ""])
def test_who_is_no_agent_is_told_so(tmp_path: Path, tls: TlsFiles, name: str) -> None:
    stranger = fleet_files(tmp_path / "stranger", FLEET, name or "x")
    with served(tls, offered(tmp_path, [])) as one, connected(one, stranger) as connection:
        status, said = ask(connection, manifest_key(DIGEST))
        assert status == 403
        assert said.startswith(b"agents are served here (zerowake-agent); the certificate's name is")


def test_a_certificate_of_another_authority_is_none(tmp_path: Path, tls: TlsFiles) -> None:
    stranger = fleet_files(tmp_path / "stranger", Authority("strangers"))
    (tmp_path / "stranger/ca.crt").write_bytes(FLEET.certificate)
    with served(tls, offered(tmp_path, [])) as one, pytest.raises((ssl.SSLError, ConnectionError)), connected(one, stranger) as connection:
        ask(connection, manifest_key(DIGEST))


def test_a_reader_beyond_the_bound_is_told_so_and_one_that_can_wait_is_served(tmp_path: Path, tls: TlsFiles) -> None:
    [chunk] = make_chunks(tmp_path, 1)
    with served(tls, offered(tmp_path, [chunk]), streams=1) as one, connected(one, tls) as first, connected(one, tls) as second:
        with one.egress.stream(0):
            assert ask(first, chunk_key(chunk.hash)) == (503, b"this node serves 1 readers already\n")
            second.request("GET", f"/{NAMESPACE}/{DIGEST}/{chunk_key(chunk.hash)}", headers={"Prefer": "wait=19"})
        assert second.getresponse().read() == (tmp_path / chunk.hash).read_bytes()


def check_next(one: Served, tls: TlsFiles) -> None:
    with connected(one, tls) as connection:
        assert ask(connection, manifest_key(DIGEST)) == (200, MANIFEST)


def test_where_no_thread_can_be_started_one_reader_has_to_come_again(tmp_path: Path, tls: TlsFiles) -> None:
    with served(tls, offered(tmp_path, [])) as one:
        with no_threads(), pytest.raises(OSError), connected(one, tls):
            pass
        check_next(one, tls)


def test_where_there_is_no_descriptor_left_readers_wait(tmp_path: Path, tls: TlsFiles, caplog: pytest.LogCaptureFixture) -> None:
    with served(tls, offered(tmp_path, [])) as one, socket.socket() as raw:
        with descriptors_left(0):
            raw.connect(("127.0.0.1", one.server.port))
            blocking_until(lambda: caplog.text.count("was not taken: the agent has no descriptor left") > 1, "it is tried again and again")
        check_next(one, tls)


@pytest.mark.parametrize("sent", [b"\x16\x03", b"GET / HTTP/1.1\r\n\r\n", b""])
def test_who_does_not_speak_tls_disturbs_nobody(tmp_path: Path, tls: TlsFiles, sent: bytes) -> None:
    with served(tls, offered(tmp_path, [])) as one, socket.create_connection(("127.0.0.1", one.server.port)) as stranger:
        stranger.sendall(sent)
        with connected(one, tls) as connection:
            assert ask(connection, manifest_key(DIGEST)) == (200, MANIFEST)


@pytest.mark.parametrize("sent", [b"nonsense\r\n\r\n", b"GET /" + b"a" * 70_000, b"GET / HTTP/1.1\r\nA: b\r\n" * 3000])
def test_nonsense_ends_its_own_connection(tmp_path: Path, tls: TlsFiles, sent: bytes) -> None:
    with served(tls, offered(tmp_path, [])) as one:
        with connected(one, tls) as connection, pytest.raises((OSError, http.client.HTTPException)):
            assert isinstance(connection.sock, ssl.SSLSocket)
            connection.sock.sendall(sent)
            while True:
                if not connection.sock.recv(100):
                    raise ConnectionError
        with connected(one, tls) as connection:
            assert ask(connection, manifest_key(DIGEST)) == (200, MANIFEST)


def test_its_end_ends_those_who_wait_and_leaves_no_thread(tmp_path: Path, tls: TlsFiles) -> None:
    before = threading.active_count()
    chunks = make_chunks(tmp_path, 1, 600_000)
    with served(tls, offered(tmp_path, chunks), rate=1.0) as one, connected(one, tls) as idle, connected(one, tls) as waiting:
        ask(idle, "x")
        waiting.request("GET", f"/{NAMESPACE}/{DIGEST}/{chunk_key(chunks[0].hash)}")
        blocking_until(lambda: one.egress.sent, "the first piece")
    assert threading.active_count() == before


def test_a_port_that_is_taken_is_named(tmp_path: Path, tls: TlsFiles) -> None:
    taken = pytest.raises(CannotListen, match=r"the server for other agents cannot listen on .*in use")
    with served(tls) as one, taken, PeerServer.listening(one.address, server_context(tls), one.offers, one.egress):
        pass


def test_a_chunk_in_the_middle_of_a_file(tmp_path: Path, tls: TlsFiles) -> None:
    chunk = Chunk("ab" * 32, 300_000)
    (tmp_path / "model.safetensors").write_bytes(b"a" * 1000 + b"b" * 300_000 + b"c" * 1000)
    one = Offered(NAMESPACE, DIGEST, MANIFEST, b"", [chunk])
    one.arrived(chunk, tmp_path / "model.safetensors", 1000)
    with served(tls, one) as there, connected(there, tls) as connection:
        assert ask(connection, chunk_key(chunk.hash)) == (200, b"b" * 300_000)
        assert ask(connection, chunk_key(chunk.hash), Range="bytes=299999-299999") == (206, b"b")


def test_a_file_that_became_shorter_ends_the_connection(tmp_path: Path, tls: TlsFiles) -> None:
    [chunk] = make_chunks(tmp_path, 1, 1000)
    with served(tls, offered(tmp_path, [chunk])) as one, connected(one, tls) as connection:
        (tmp_path / chunk.hash).write_bytes(b"short")
        with pytest.raises(http.client.IncompleteRead):
            ask(connection, chunk_key(chunk.hash))


def test_what_stands_in_memory_is_sent_from_there(tmp_path: Path, tls: TlsFiles) -> None:
    memory = bytes(range(256)) * 4096
    chunk = Chunk("ab" * 32, len(memory))
    one = Offered(NAMESPACE, DIGEST, MANIFEST, b"", [chunk], lambda _: memoryview(memory))
    with served(tls, one) as there, connected(there, tls) as connection:
        assert ask(connection, chunk_key(chunk.hash), Range="bytes=300000-800000") == (206, memory[300_000:800_001])


def test_a_request_that_comes_byte_by_byte_is_not_waited_for(tmp_path: Path, tls: TlsFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_server, "_HEAD_SECONDS", 0.1)
    with served(tls, offered(tmp_path, [])) as one, connected(one, tls) as connection:
        assert isinstance(connection.sock, ssl.SSLSocket)
        connection.sock.sendall(b"GET /")
        assert connection.sock.recv(1) == b"", "within the patience of this test, which is shorter than that with one who asks nothing"


class _Trickling:
    """A connection whose reader takes a byte in ten seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sent = 0
        self._timeout = 0.0

    def settimeout(self, seconds: float) -> None:
        self._timeout = seconds

    def send(self, data: memoryview) -> int:
        if self._timeout < 10:
            raise TimeoutError
        self.now += 10
        self.sent += 1
        return 1


def test_a_reader_who_takes_byte_by_byte_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = _Trickling()
    monkeypatch.setattr(peer_server.time, "monotonic", lambda: reader.now)
    with pytest.raises(TimeoutError):
        peer_server._send(reader, memoryview(bytes(1000)))  # type: ignore[arg-type]
    assert reader.sent == 3
