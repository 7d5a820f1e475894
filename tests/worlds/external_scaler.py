"""KEDA's service over a ledger, with a KEDA that asks it over real sockets, and what tests wait for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from scaler.books.ledger import Ledger
from scaler.keda.external_scaler import serve_external_scaler
from tests.worlds.keda_client import Keda, Watched

QUIET = 0.3  # seconds in which nothing may come: longer than REPEAT
REPEAT = 0.1


@asynccontextmanager
async def serving(ledger: Ledger, repeat_seconds: float = 60, **options: object) -> AsyncIterator[Keda]:
    """A scaler and a KEDA that knows it; without repeats unless asked for."""
    address = "127.0.0.1:0"
    async with (
        serve_external_scaler(ledger, address=address, repeat_seconds=repeat_seconds, **options) as bound,  # type: ignore[arg-type]
        Keda(bound, backoff=(0.05, 1.0)) as keda,
    ):
        yield keda


async def opened(watched: Watched) -> Watched:
    """Both streams are known to the scaler: it answered the second, opened after the first on the same connection."""
    async with asyncio.timeout(10):
        await watched.specs.get()
    return watched


async def nothing_more(watched: Watched) -> None:
    with pytest.raises(TimeoutError):
        await watched.true(within=QUIET)
