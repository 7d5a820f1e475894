"""Who may tell the agent to do things: the scaler, known by the name in its certificate.

A CA alone was rejected as the check: the agents' own certificates come from the same one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc

CLIENT = b"zerowake-scaler"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


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
