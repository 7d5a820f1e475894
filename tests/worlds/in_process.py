"""A gRPC channel whose other end is a servicer in this process: no socket, no thread of gRPC's, and no time but the loop's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import grpc


class _Context:
    """What servicers use of a call's context."""

    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn:
        raise _failed(code, details)


class InProcessChannel:
    """`InProcessChannel(agent, add_AgentServicer_to_server)`: stands in for a grpc.aio.Channel. Deadlines hold."""

    def __init__(self, servicer: Any, register: Callable[[Any, Any], None]) -> None:
        self._handlers: dict[str, Any] = {}
        register(servicer, self)

    # What the generated `add_…Servicer_to_server` calls of a server.

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        pass

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self._handlers |= {f"/{service}/{method}": handler for method, handler in handlers.items()}

    # What the generated stub calls of a channel.

    def unary_unary(self, method: str, **_: Any) -> Callable[..., Any]:
        async def call(request: Any, timeout: float | None = None, metadata: Any = None) -> Any:  # noqa: ASYNC109  # as gRPC calls it
            try:
                async with asyncio.timeout(timeout):
                    return await self._handlers[method].unary_unary(request, _Context())
            except TimeoutError:
                raise _failed(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from None

        return call

    def unary_stream(self, method: str, **_: Any) -> Callable[..., AsyncIterator[Any]]:
        def call(request: Any) -> AsyncIterator[Any]:
            return self._handlers[method].unary_stream(request, _Context())

        return call

    async def close(self) -> None:
        pass


def _failed(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
