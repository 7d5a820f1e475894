"""Certificates that change under a running server, gRPC's and asyncio's alike."""

import asyncio
import contextlib
import datetime
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY

from tests.worlds.certificates import Authority, Pair
from tests.worlds.exhausted import descriptors_left
from zerowake_shared.tls import BadCertificate, TlsFiles, client_contexts, client_credentials, server_context, server_credentials

Served: TypeAlias = Callable[[TlsFiles], contextlib.AbstractAsyncContextManager[int]]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("zerowake test authority")


@contextlib.asynccontextmanager
async def grpc_server(files: TlsFiles, servicer: health.aio.HealthServicer | None = None) -> AsyncIterator[int]:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(servicer or health.aio.HealthServicer(), server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(files))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def asyncio_server(files: TlsFiles) -> AsyncIterator[int]:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                writer.write(line)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=server_context(files))
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture(params=[grpc_server, asyncio_server], ids=["gRPC", "asyncio"])
def served(request: pytest.FixtureRequest) -> Served:
    found: Served = request.param
    return found


def handshake(port: int) -> bytes:
    """The certificate that a new connection is shown (DER), without trusting or offering any."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain, context.wrap_socket(plain) as wrapped:
        shown = wrapped.getpeercert(binary_form=True)
        assert shown
        return shown


async def shows(port: int, pair: Pair) -> bool:
    return await asyncio.to_thread(handshake, port) == ssl.PEM_cert_to_DER_cert(pair.certificate.decode())


def reloads(result: str) -> float:
    return REGISTRY.get_sample_value("zerowake_tls_reloads_total", {"result": result}) or 0.0


async def test_a_renewed_certificate_counts_from_the_next_handshake(served: Served, authority: Authority, tmp_path: Path) -> None:
    first, second = authority.issue("first.zerowake"), authority.issue("second.zerowake")
    current = tmp_path / "current"  # swapped as the kubelet swaps a Secret: a symlink to a folder
    for name, pair in (("1", first), ("2", second)):
        (tmp_path / name).mkdir()
        pair.write(tmp_path / name, "tls")
    current.symlink_to("1")
    async with served(TlsFiles(current / "tls.crt", current / "tls.key")) as port:
        assert await shows(port, first)
        (tmp_path / "next").symlink_to("2")
        (tmp_path / "next").rename(current)
        used = reloads("used")
        for _ in range(2):
            assert await shows(port, second)
        assert reloads("used") == used + 1


async def test_an_open_connection_outlives_the_certificate_that_it_began_with(authority: Authority, tmp_path: Path) -> None:
    files = TlsFiles(*authority.issue("first.zerowake").write(tmp_path, "tls"))
    servicer = health.aio.HealthServicer()
    credentials = grpc.ssl_channel_credentials(authority.certificate)
    async with grpc_server(files, servicer) as port, grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        stream = aiter(stub.Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(stream)).status == health_pb2.HealthCheckResponse.SERVING
        renewed = authority.issue("second.zerowake")
        renewed.write(tmp_path, "tls")
        assert await shows(port, renewed)
        await servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert (await anext(stream)).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_broken_renewal_leaves_the_old_certificate(
    served: Served, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = authority.issue("first.zerowake"), authority.issue("second.zerowake")
    files = TlsFiles(*first.write(tmp_path, "tls"))
    async with served(files) as port:
        refused = reloads("refused")
        files.certificate.write_bytes(second.certificate)  # its key follows later
        assert await shows(port, first)
        files.key.unlink()
        assert await shows(port, first)
        assert reloads("refused") == refused + 2
        assert str(files.key) in caplog.text
        files.key.write_bytes(second.key)
        assert await shows(port, second)


def test_a_renewal_that_could_not_be_read_for_a_moment_is_read_at_the_next_handshake(authority: Authority, tmp_path: Path) -> None:
    """A process without a descriptor left, as one of a mount that did not answer: nothing is wrong with the files."""
    authority.issue("first.zerowake").write(tmp_path, "tls")
    contexts = client_contexts(TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key"))
    first = contexts()
    authority.issue("second.zerowake").write(tmp_path, "tls")
    with descriptors_left(0):
        assert contexts() is first
    assert contexts() is not first


async def test_mutual_tls_from_one_folder_on_both_sides(authority: Authority, tmp_path: Path) -> None:
    for name, issuer in (("server", authority), ("client", authority), ("stranger", Authority("another authority"))):
        (tmp_path / name).mkdir()
        issuer.issue(f"{name}.zerowake").write(tmp_path / name, "tls")
        (tmp_path / name / "ca.crt").write_bytes(authority.certificate)

    async def check(port: int, credentials: grpc.ChannelCredentials) -> None:
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            await stub.Check(health_pb2.HealthCheckRequest())

    async with grpc_server(TlsFiles.in_folder(tmp_path / "server")) as port:
        await check(port, client_credentials(TlsFiles.in_folder(tmp_path / "client")))
        for refused in (
            client_credentials(TlsFiles.in_folder(tmp_path / "stranger")),
            grpc.ssl_channel_credentials(authority.certificate),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await check(port, refused)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE


class Rotated:
    """A folder of tls.crt, tls.key and ca.crt that is swapped as the kubelet swaps a Secret."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder / name, name
        self._folder.mkdir()
        self.files = TlsFiles.in_folder(self._folder / "current")
        self._count = 0

    def rotate(self, issuer: Authority, *trusted: Authority) -> Pair:
        self._count += 1
        fresh = self._folder / f"{self._count}"
        fresh.mkdir()
        pair = issuer.issue(f"{self._name}.zerowake")
        pair.write(fresh, "tls")
        (fresh / "ca.crt").write_bytes(b"".join(each.certificate for each in trusted))
        (self._folder / "next").symlink_to(fresh.name)
        (self._folder / "next").rename(self._folder / "current")
        return pair


async def test_rotation_under_load_costs_no_call(authority: Authority, tmp_path: Path) -> None:
    """Both sides' certificates again and again, then the authority itself: first both are trusted, then the new one issues, then alone."""
    successor = Authority("zerowake test authority, the next")
    server, client = Rotated(tmp_path, "server"), Rotated(tmp_path, "client")
    for side in (server, client):
        side.rotate(authority, authority)
    done, failed, is_over = 0, list[str](), False

    async def calls(port: int) -> None:
        nonlocal done
        while not is_over:
            async with grpc.aio.secure_channel(f"localhost:{port}", client_credentials(client.files)) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                for _ in range(3):
                    try:
                        await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
                        done += 1
                    except grpc.aio.AioRpcError as error:
                        failed.append(f"after {done} calls: {error.details()}")

    async with grpc_server(server.files) as port, asyncio.timeout(120), asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(calls(port))
        steps = [(authority, (authority,))] * 20
        steps += [(authority, (authority, successor)), (successor, (authority, successor)), (successor, (successor,))]
        for issuer, trusted in steps:
            for side in (client, server):
                pair = side.rotate(issuer, *trusted)
                before = done
                while done < before + 8 and not failed:
                    await asyncio.sleep(0.01)  # others call meanwhile
        is_over = True
        assert await shows(port, pair)
    assert failed == []


async def test_a_renewal_in_the_midst_of_reading_mixes_no_two(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = Rotated(tmp_path, "server"), Rotated(tmp_path, "client")
    for side in (server, client):
        side.rotate(authority, authority)
    read, rotated = Path.read_bytes, list[str]()

    def renewed_after(path: Path) -> bytes:
        content = read(path)
        side = server if server.files.key == path else client
        if path.name == "tls.key" and str(path) not in rotated:
            rotated.append(str(path))
            side.rotate(authority, authority)
        return content

    monkeypatch.setattr(Path, "read_bytes", renewed_after)
    async with grpc_server(server.files) as port, grpc.aio.secure_channel(f"localhost:{port}", client_credentials(client.files)) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert len(rotated) == 2


@pytest.mark.parametrize("read", [server_credentials, client_credentials, server_context])
def test_bad_files_are_named_at_the_start(read: Callable[[TlsFiles], object], authority: Authority, tmp_path: Path) -> None:
    good, other = authority.issue("scaler.zerowake"), authority.issue("other.zerowake")
    certificate, key = good.write(tmp_path, "good")
    _, other_key = other.write(tmp_path, "other")
    locked = tmp_path / "locked.key"
    password = serialization.BestAvailableEncryption(b"secret")
    private = load_pem_private_key(good.key, None)
    locked.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, password))
    for files, words in [
        (TlsFiles(tmp_path / "none.crt", key), ["none.crt", "No such file"]),
        (TlsFiles(certificate, other_key), ["good.crt", "other.key", "renew both"]),
        (TlsFiles(certificate, locked), ["locked.key is encrypted"]),
        (TlsFiles(certificate, key, key), ["good.key holds no CA"]),
    ]:
        with pytest.raises(BadCertificate) as bad:
            read(files)
        for word in words:
            assert word in str(bad.value)


def test_a_client_shows_the_certificate_that_its_files_hold_when_it_connects(tmp_path: Path, authority: Authority) -> None:
    def renew(name: str) -> TlsFiles:
        certificate, key = authority.issue(name).write(tmp_path, "tls")
        (tmp_path / "ca.crt").write_bytes(authority.certificate)
        return TlsFiles(certificate, key, tmp_path / "ca.crt")

    def shown(context: ssl.SSLContext) -> object:
        """What a server sees of who connects, without a network."""
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = serving.wrap_bio(to_server, to_client, server_side=True)
        client = context.wrap_bio(to_client, to_server, server_hostname="localhost")
        for _ in range(3):
            for side in (client, server):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
        certificate: dict[str, Any] = dict(server.getpeercert() or {})
        return certificate["subject"][-1][0][1]

    files = renew("agent")
    serving = server_context(files)
    contexts = client_contexts(files)
    assert contexts() is contexts()
    assert shown(contexts()) == "agent"
    renew("renewed")
    assert shown(contexts()) == "renewed"
    files.key.write_text("torn")
    assert shown(contexts()) == "renewed"
    with pytest.raises(BadCertificate):
        client_contexts(files)


def test_the_end_of_a_certificate_in_use_is_shown_also_after_its_renewal(tmp_path: Path) -> None:
    """Of the several in one file, that of the one that ends first."""
    day, week = (Authority("zerowake test authority", datetime.timedelta(days=days)) for days in (1, 7))
    files = TlsFiles(*week.issue("first.zerowake").write(tmp_path, "tls"), tmp_path / "ca.crt")
    assert files.client_ca
    files.client_ca.write_bytes(week.certificate + day.certificate)
    server_context(files)
    now = time.time()
    assert _days_left(files.certificate, now) == pytest.approx(7, abs=0.1)
    assert _days_left(files.client_ca, now) == pytest.approx(1, abs=0.1)
    day.issue("second.zerowake").write(tmp_path, "tls")
    server_context(files)
    assert _days_left(files.certificate, now) == pytest.approx(1, abs=0.1)


def _days_left(file: Path, now: float) -> float:
    end = REGISTRY.get_sample_value("zerowake_tls_certificate_expiry_timestamp_seconds", {"file": str(file)})
    assert end is not None
    return (end - now) / 86400
