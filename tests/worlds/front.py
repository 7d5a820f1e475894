"""A gateway with what stands behind it, and what tests ask it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from scaler.books.activation import Activations
from scaler.books.demand import Demand
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.gateway.client_room import ClientRoom
from scaler.gateway.dispatcher import Dispatcher
from scaler.gateway.gateway import Gateway


@dataclass
class Front:
    ledger: Ledger
    dispatcher: Dispatcher
    activations: Activations
    gateway: Gateway
    url: str
    client: aiohttp.ClientSession

    def ask(self, text: str = "hello", *, model: str = "m", stream: bool = False, **headers: str) -> asyncio.Task[Answer]:
        """Sends a chat request in a task; a header's name is written with underscores."""
        return asyncio.create_task(self._ask(text, model, stream, {name.replace("_", "-"): value for name, value in headers.items()}))

    async def _ask(self, text: str, model: str, stream: bool, headers: dict[str, str]) -> Answer:
        body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": text}]}
        async with self.client.post(f"{self.url}/v1/chat/completions", json=body, headers=headers) as response:
            return Answer(response.status, dict(response.headers), await response.read())

    async def until(self, reached: Callable[[Demand], bool], model: str = "m", within: float = 10.0) -> None:
        """Waits for a model's demand to be so."""
        with self.ledger.subscribe(model) as subscription:
            async with asyncio.timeout(within):
                while not reached(self.ledger.demand(model)):
                    await subscription.changed()

    async def held(self, count: int) -> None:
        await self.until(lambda demand: demand.held == count)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, str]:
        return json.loads(self.body)["error"]

    @property
    def text(self) -> str:
        return json.loads(self.body)["choices"][0]["message"]["content"]


@asynccontextmanager
async def front(body_bytes: int = 2**20, room: ClientRoom | None = None, **limits: float) -> AsyncIterator[Front]:
    """A gateway for one model `m`, listening. room: of its clients."""
    ledger = Ledger({"m": ModelLimits(**limits)})  # type: ignore[arg-type]
    dispatcher = Dispatcher(ledger)
    gateway = Gateway(ledger, dispatcher, body_bytes=body_bytes, room=room)
    async with (
        gateway.serve("127.0.0.1", 0) as (host, port),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False) as client,
    ):
        try:
            yield Front(ledger, dispatcher, ledger.activations, gateway, f"http://{host}:{port}", client)
        finally:
            await dispatcher.close()
