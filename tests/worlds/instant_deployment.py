"""A deployment whose replicas are ready at once."""

from __future__ import annotations

import asyncio

from scaler.books.ledger import Ledger


class InstantDeployment:
    """Does at once what it is asked, and tells the ledger of its replicas as the gateway would; `wishes` is what it was asked."""

    def __init__(self, ledger: Ledger, model: str, replicas: int = 0) -> None:
        self.wishes: list[int] = []
        self.broken = False
        self._ledger, self._model = ledger, model
        self._replicas = 0
        self._changed = asyncio.Event()
        self.become(replicas)

    def become(self, replicas: int) -> None:
        self._replicas = replicas
        self._ledger.set_replicas(self._model, ready=replicas, replicas=replicas)
        self._changed.set()

    def replicas(self) -> int:
        return self._replicas

    async def scale(self, replicas: int) -> None:
        self.wishes.append(replicas)
        self._changed.set()
        if self.broken:
            raise RuntimeError("no room on any node")
        self.become(replicas)

    async def until(self, replicas: int) -> None:
        async with asyncio.timeout(10):
            while self._replicas != replicas:
                self._changed.clear()
                await self._changed.wait()

    async def until_asked(self, times: int) -> None:
        async with asyncio.timeout(10):
            while len(self.wishes) < times:
                self._changed.clear()
                await self._changed.wait()
