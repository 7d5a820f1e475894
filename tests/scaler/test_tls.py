"""TLS and mTLS as KEDA uses them, and certificates that change under a running scaler."""

import asyncio
import socket
import ssl
import warnings
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from prometheus_client import REGISTRY

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.keda.external_scaler import serve_external_scaler
from tests.worlds.certificates import Authority
from tests.worlds.keda_client import Keda, ref
from zerowake_shared.tls import BadCertificate, TlsFiles, server_credentials


@pytest.fixture
def ledger() -> Ledger:
    return Ledger({"chat": ModelLimits()})


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("zerowake test authority")


def handshake(address: str, versions: tuple[ssl.TLSVersion, ssl.TLSVersion] | None = None) -> bytes:
    """The certificate that a new connection is shown (DER), without trusting or offering any."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if versions:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that it is deprecated is what is tested
            context.minimum_version, context.maximum_version = versions
        context.set_ciphers("ALL:@SECLEVEL=0")
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as plain, context.wrap_socket(plain) as wrapped:
        shown = wrapped.getpeercert(binary_form=True)
        assert shown
        return shown


def reloads(result: str) -> float:
    return REGISTRY.get_sample_value("zerowake_tls_reloads_total", {"result": result}) or 0.0


async def refused(address: str, credentials: grpc.ChannelCredentials | None) -> None:
    async with Keda(address, credentials) as keda:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await keda.stub.IsActive(ref("chat"))
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_tls(ledger: Ledger, authority: Authority, tmp_path: Path) -> None:
    files = TlsFiles(*authority.issue("scaler.zerowake").write(tmp_path, "server"))
    async with serve_external_scaler(ledger, address="127.0.0.1:0", tls=files) as address:
        async with Keda(address, grpc.ssl_channel_credentials(authority.certificate)) as keda:
            chat = keda.watch(ref("chat"))
            ledger.hold("chat", 1)
            await chat.true()
            assert await keda.poll(ref("chat")) == (1.0, True)
        await refused(address, None)
        await refused(address, grpc.ssl_channel_credentials(Authority("stranger").certificate))


async def test_tls_is_1_2_or_newer(ledger: Ledger, authority: Authority, tmp_path: Path) -> None:
    files = TlsFiles(*authority.issue("scaler.zerowake").write(tmp_path, "server"))
    old, new = (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1), (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2)
    async with serve_external_scaler(ledger, address="127.0.0.1:0", tls=files) as address:
        await asyncio.to_thread(handshake, address, new)
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await asyncio.to_thread(handshake, address, old)


async def test_mtls_refuses_a_client_without_a_certificate_of_its_authority(ledger: Ledger, authority: Authority, tmp_path: Path) -> None:
    clients = Authority("keda's authority")
    (tmp_path / "clients.crt").write_bytes(clients.certificate)
    files = TlsFiles(*authority.issue("scaler.zerowake").write(tmp_path, "server"), tmp_path / "clients.crt")
    mine, forged = clients.issue("keda-operator"), Authority("keda's authority").issue("keda-operator")
    async with serve_external_scaler(ledger, address="127.0.0.1:0", tls=files) as address:
        async with Keda(address, grpc.ssl_channel_credentials(authority.certificate, mine.key, mine.certificate)) as keda:
            assert await keda.poll(ref("chat")) == (0.0, False)
        await refused(address, grpc.ssl_channel_credentials(authority.certificate))
        await refused(address, grpc.ssl_channel_credentials(authority.certificate, forged.key, forged.certificate))


async def test_a_renewed_certificate_counts_from_the_next_handshake(ledger: Ledger, authority: Authority, tmp_path: Path) -> None:
    first, second = authority.issue("first.zerowake"), authority.issue("second.zerowake")
    current = tmp_path / "current"  # swapped as the kubelet swaps a Secret: a symlink to a folder
    for name, pair in (("1", first), ("2", second)):
        (tmp_path / name).mkdir()
        pair.write(tmp_path / name, "tls")
    current.symlink_to("1")
    files = TlsFiles(current / "tls.crt", current / "tls.key")
    async with (
        serve_external_scaler(ledger, address="127.0.0.1:0", tls=files) as address,
        Keda(address, grpc.ssl_channel_credentials(authority.certificate)) as old,
    ):
        chat = old.watch(ref("chat"))
        await chat.specs.get()
        assert await asyncio.to_thread(handshake, address) == ssl.PEM_cert_to_DER_cert(first.certificate.decode())

        (tmp_path / "next").symlink_to("2")
        (tmp_path / "next").rename(current)
        used = reloads("used")
        for _ in range(2):
            assert await asyncio.to_thread(handshake, address) == ssl.PEM_cert_to_DER_cert(second.certificate.decode())
        assert reloads("used") == used + 1
        async with Keda(address, grpc.ssl_channel_credentials(authority.certificate)) as new:
            assert await new.poll(ref("chat")) == (0.0, False)

        ledger.hold("chat", 1)  # the connection from before still lives
        await chat.true()
        assert chat.ends.empty()


async def test_a_broken_renewal_leaves_the_old_certificate(
    ledger: Ledger, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = authority.issue("first.zerowake"), authority.issue("second.zerowake")
    files = TlsFiles(*first.write(tmp_path, "tls"))
    async with serve_external_scaler(ledger, address="127.0.0.1:0", tls=files) as address:
        used, before = reloads("refused"), ssl.PEM_cert_to_DER_cert(first.certificate.decode())
        files.certificate.write_bytes(second.certificate)  # its key follows later
        assert await asyncio.to_thread(handshake, address) == before
        files.key.unlink()
        assert await asyncio.to_thread(handshake, address) == before
        assert reloads("refused") == used + 2
        assert str(files.key) in caplog.text
        files.key.write_bytes(second.key)
        assert await asyncio.to_thread(handshake, address) == ssl.PEM_cert_to_DER_cert(second.certificate.decode())


def test_bad_files_are_named_at_the_start(authority: Authority, tmp_path: Path) -> None:
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
            server_credentials(files)
        for word in words:
            assert word in str(bad.value)
