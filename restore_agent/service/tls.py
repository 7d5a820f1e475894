"""mTLS for the agent's gRPC: who may tell it to do things is the scaler, known by the name in its certificate.

Certificates may change while it runs (a Secret that is renewed): gRPC asks at every handshake, and gets the files as they are then; where
they are half written, those of before. A CA alone was rejected as the check: the agents' own certificates come from the same one.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import grpc

CLIENT = b"zerowake-scaler"
_LOG = logging.getLogger("zerowake.agent")
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class BadCertificate(Exception):
    """The files cannot be used; names them and the remedy."""


def server_credentials(folder: Path) -> grpc.ServerCredentials:
    """`folder`: tls.crt, tls.key and ca.crt, the clients' CA, as in a Kubernetes Secret. Raises BadCertificate."""
    seen = _signature(folder)

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        # An exception here would refuse the handshake: whatever is wrong with the new files, the old ones still serve.
        try:
            if (now := _signature(folder)) == seen:
                return None
            seen = now
            configuration = _read(folder)
        except BadCertificate as error:
            _LOG.error("the changed TLS files are not used, the old certificate goes on: %s", error)
            return None
        _LOG.info("TLS certificate read again from %s", folder)
        return configuration

    return grpc.dynamic_ssl_server_credentials(
        _read(folder),
        changed,  # type: ignore[arg-type]  # the stubs don't know that None means "unchanged"
        require_client_authentication=True,
    )


class OnlyTheScaler(grpc.aio.ServerInterceptor):
    """Refuses callers whose certificate has another name. Callers on the agent's own UNIX socket have none, and are root."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]], handler_call_details: grpc.HandlerCallDetails
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        if handler.response_streaming:
            stream = handler.unary_stream
            assert stream is not None

            async def checked_stream(request: Any, context: Any) -> AsyncIterator[Any]:
                await _check(context)
                async for response in stream(request, context):  # type: ignore[attr-defined]
                    yield response

            return grpc.unary_stream_rpc_method_handler(
                checked_stream, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
            )
        unary = handler.unary_unary
        assert unary is not None

        async def checked(request: Any, context: Any) -> Any:
            await _check(context)
            return await unary(request, context)

        return grpc.unary_unary_rpc_method_handler(
            checked, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )


async def _check(context: Any) -> None:
    if context.peer().startswith("unix:"):
        return
    names = context.auth_context().get("x509_common_name", ())
    if CLIENT not in names:
        shown = ", ".join(name.decode(errors="replace") for name in names) or "none"
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"the agent serves {CLIENT.decode()}; the certificate's name is {shown}")


def _signature(folder: Path) -> tuple[tuple[int, int, int], ...]:
    found = []
    for name in ("tls.crt", "tls.key", "ca.crt"):
        try:
            stat = (folder / name).stat()
        except OSError as error:
            raise BadCertificate(f"{folder / name}: {error.strerror}; --tls is a folder with tls.crt, tls.key and ca.crt") from error
        found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(found)


def _read(folder: Path) -> grpc.ServerCertificateConfiguration:
    """The files as gRPC takes them, after OpenSSL found that they belong together (gRPC itself only fails at the handshake)."""
    certificate, key, authority = folder / "tls.crt", folder / "tls.key", folder / "ca.crt"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        raise BadCertificate(
            f"{folder} holds no certificate with its key and the clients' CA in PEM form ({error}); renew all three"
        ) from error
    return grpc.ssl_server_certificate_configuration([(key.read_bytes(), certificate.read_bytes())], authority.read_bytes())
