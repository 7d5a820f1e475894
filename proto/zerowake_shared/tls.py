"""TLS for our servers and their clients, with certificates that may change while a server runs.

gRPC asks for the certificate at every handshake (`dynamic_ssl_server_credentials`). The answer comes from memory unless one of the files
changed, which a `stat` tells, so that a rotated Kubernetes Secret (a symlink that is swapped) counts from the next handshake on; open
connections keep the certificate they began with. OpenSSL asks in the same moment (the callback for the name that the client wants). A
renewal that is half written, or whose key is not the certificate's, is logged and passed over: the old pair goes on serving until the files
change again. A watcher of the files (inotify, a timer) was rejected: it misses bind mounts or comes late, and a `stat` costs a microsecond.
TLS 1.2 is gRPC's own minimum, and KEDA's.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NoReturn, TypeAlias, TypeVar

import grpc
from cryptography import x509
from prometheus_client import Counter, Gauge

log = logging.getLogger(__name__)

T = TypeVar("T")
_Signature: TypeAlias = tuple[tuple[int, int, int], ...]  # by which a change of files is seen
_RENEWALS = 5  # that may come in a row as files are read
EXPIRY = Gauge(
    "zerowake_tls_certificate_expiry_timestamp_seconds",
    "When a file of certificates in use ends, by Unix time: of those in it that which ends first.",
    ["file"],
)
RELOADS = Counter("zerowake_tls_reloads_total", "Changed certificate files that were read again, by result.", ["result"])


class BadCertificate(Exception):
    """Certificate, key or client CA cannot be used; the message names the files and the remedy."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the certificate chain, its key (not encrypted) and, for mTLS, the CAs that a client's certificate must come from."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @classmethod
    def in_folder(cls, folder: Path) -> TlsFiles:
        """tls.crt, tls.key and ca.crt of one folder, as a Kubernetes Secret has them, for mTLS."""
        return cls(folder / "tls.crt", folder / "tls.key", folder / "ca.crt")


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that follow `files`; a client must show a certificate if there is a `client_ca`.

    Raises:
        BadCertificate: the files cannot be used as they are now.
    """
    follower = _Follower(files, _for_grpc)
    return grpc.dynamic_ssl_server_credentials(
        follower.load(),
        follower.changed,  # type: ignore[arg-type]  # the stubs don't know that None means "unchanged"
        require_client_authentication=files.client_ca is not None,
    )


def client_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Credentials of a client that shows its own certificate, to servers whose certificate comes from `client_ca`, as the files are now.

    Raises:
        BadCertificate: the files cannot be used.
    """
    found, _ = _settled(files, _for_channels)
    return found


def client_contexts(files: TlsFiles) -> Callable[[], ssl.SSLContext]:
    """The same for sockets of Python's: what makes the context of the next connection, by the files as they are then.

    Raises:
        BadCertificate: the files cannot be used as they are now.
    """
    follower = _Follower(files, _for_clients)
    current = follower.load()

    def context() -> ssl.SSLContext:
        nonlocal current
        current = follower.changed() or current
        return current

    return context


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """The same for a server of asyncio's.

    Raises:
        BadCertificate: the files cannot be used as they are now.
    """
    follower = _Follower(files, _for_openssl)
    current = context = follower.load()

    def handshake(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal current
        current = follower.changed() or current
        connection.context = current

    context.sni_callback = handshake
    return context


class _Follower(Generic[T]):
    """Reads the files when they changed. gRPC calls `changed` from a thread of its own, one handshake at a time."""

    def __init__(self, files: TlsFiles, read: Callable[[TlsFiles], T]) -> None:
        self._files = files
        self._read = read
        self._seen: _Signature = ()

    def load(self) -> T:
        found, self._seen = _settled(self._files, self._read)
        return found

    def changed(self) -> T | None:
        # An exception here would refuse the handshake: whatever is wrong with the new files, the old ones still serve.
        try:
            signature = _signature(self._files)
            if signature == self._seen:
                return None
            self._seen = signature
            found, self._seen = _settled(self._files, self._read)
        except BadCertificate as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, ssl.SSLError):
                self._seen = ()  # nothing is known of what they say: they are read again at the next handshake
            log.error("the changed TLS files are not used, the old certificate goes on: %s", error)
            RELOADS.labels("refused").inc()
            return None
        RELOADS.labels("used").inc()
        log.info("TLS certificate read again from %s", self._files.certificate)
        return found


def _settled(files: TlsFiles, read: Callable[[TlsFiles], T]) -> tuple[T, _Signature]:
    """What `read` makes of them, all of one time: a renewal in its midst would give it one's certificate with the other's key."""
    left = _RENEWALS
    while True:
        before = _signature(files)
        try:
            found = read(files)
        except BadCertificate:
            if not left or _signature(files) == before:
                raise
        else:
            if not left or _signature(files) == before:
                return found, before
        left -= 1


def _signature(files: TlsFiles) -> _Signature:
    return tuple(_stat(path) for path in (files.certificate, files.key, files.client_ca) if path)


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise BadCertificate(f"{path}: {error.strerror}; put the PEM file there or correct the path") from error
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCertificate(f"{path}: {error.strerror}") from error


def _for_grpc(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    """The files as gRPC takes them, after OpenSSL found that they belong together (gRPC itself only fails at the handshake)."""
    _for_openssl(files)
    pair = (_read(files.key), _read(files.certificate))
    return grpc.ssl_server_certificate_configuration([pair], _read(files.client_ca) if files.client_ca else None)


def _for_channels(files: TlsFiles) -> grpc.ChannelCredentials:
    _for_openssl(files)
    roots = _read(files.client_ca) if files.client_ca else None
    return grpc.ssl_channel_credentials(roots, _read(files.key), _read(files.certificate))


def _for_clients(files: TlsFiles) -> ssl.SSLContext:
    return _for_openssl(files, ssl.PROTOCOL_TLS_CLIENT)


def _for_openssl(files: TlsFiles, protocol: ssl._SSLMethod = ssl.PROTOCOL_TLS_SERVER) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)

    def refuse() -> NoReturn:
        raise BadCertificate(f"{files.key} is encrypted; store the key without a passphrase (openssl pkey -in … -out …)")

    try:
        context.load_cert_chain(files.certificate, files.key, refuse)
    except (OSError, ssl.SSLError) as error:
        raise BadCertificate(
            f"{files.certificate} and {files.key} are no certificate with its key in PEM form ({error}); renew both together"
        ) from error
    if files.client_ca:
        try:
            context.load_verify_locations(files.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise BadCertificate(f"{files.client_ca} holds no CA certificate in PEM form ({error})") from error
        context.verify_mode = ssl.CERT_REQUIRED
    for path in (files.certificate, files.client_ca):
        if path:
            _show_expiry(path)
    return context


def _show_expiry(path: Path) -> None:
    """OpenSSL has taken its certificates. Where this reader takes one of them for none, no end is shown."""
    with contextlib.suppress(ValueError, OSError):
        found = x509.load_pem_x509_certificates(path.read_bytes())
        EXPIRY.labels(str(path)).set(min(each.not_valid_after_utc for each in found).timestamp())
