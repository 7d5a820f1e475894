"""TLS and mTLS as KEDA uses them. Certificates that change are in tests/shared/test_tls.py."""

import asyncio
import socket
import ssl
import warnings
from pathlib import Path

import grpc
import pytest

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.keda.external_scaler import serve_external_scaler
from tests.worlds.certificates import Authority
from tests.worlds.keda_client import Keda, ref
from zerowake_shared.tls import TlsFiles


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
