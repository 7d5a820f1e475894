"""Objects of a bucket received where they shall lie: obstore signs a request (a presigned URL), and a connection of ours carries it.

obstore puts each object together in new memory and hands that to Python; with a hash of it on the same two cores that took twice the
processor time of this (tests/bench/README.md). Its credentials, its signature and its word for what goes wrong stay its own: whatever is
not plainly given here, the caller asks of obstore, which knows proxies, redirects and retries. After such a failure it is asked alone for a
while, so that a server that wants it otherwise is not asked twice for each chunk.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import ssl
import urllib.parse
import urllib.request
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from restore_agent.transfer.line import Line
from restore_agent.transfer.obstore_threads import obstore_threads
from restore_agent.transfer.source import Absent, TransferError, Unreachable
from restore_agent.transfer.spare_memory import PIECE, SpareMemory
from zerowake_shared.address import Address
from zerowake_shared.clock import Clock

_THREADS = 32  # reads at the same time
_VALID = datetime.timedelta(minutes=10)  # of a signature: for when a request begins
_ASIDE = 60.0  # seconds
_PORTS = {"http": 80, "https": 443}


class SignedReads:
    """Of one bucket, by as many connections as it has readers."""

    def __init__(self, store: S3Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._threads = ThreadPoolExecutor(_THREADS, "bucket")
        self._spare = SpareMemory(PIECE)
        self._lines: dict[str, Line] = {}  # by scheme and host
        self._failed = float("-inf")  # when, by the clock

    @property
    def are_tried(self) -> bool:
        """Not for a while after one has failed."""
        return self._clock.now() - self._failed > _ASIDE

    async def read(self, key: str, offset: int, length: int) -> AsyncGenerator[memoryview, None]:
        """As a Source does, and may fail where obstore does not.

        Raises:
            TransferError: also in the middle.
        """
        try:
            url = urllib.parse.urlsplit(await self._sign(key))
            line = self._line(url.scheme, url.netloc)
            async with contextlib.aclosing(line.read(f"{url.path}?{url.query}", offset, length)) as pieces:
                async for piece in pieces:
                    yield piece
        except Absent:
            raise
        except TransferError:
            self._failed = self._clock.now()
            raise

    async def _sign(self, key: str) -> str:
        with obstore_threads():
            try:
                return await obstore.sign_async(self._store, "GET", key, _VALID)
            except (BaseError, OSError, ValueError) as error:
                raise Unreachable(f"no request for {key} could be signed: {error}") from None

    def _line(self, scheme: str, host: str) -> Line:
        """Raises Unreachable: by way of a proxy, which is obstore's to speak to."""
        line = self._lines.get(f"{scheme}://{host}")
        if line is None:
            url = urllib.parse.urlsplit(f"{scheme}://{host}")
            name, port = url.hostname or "", url.port or _PORTS.get(scheme, 0)
            if {scheme, "all"} & urllib.request.getproxies().keys() and not urllib.request.proxy_bypass(name):
                raise Unreachable(f"{host} is behind a proxy")
            contexts = _context if scheme == "https" else lambda: None
            line = self._lines[f"{scheme}://{host}"] = Line(Address(name, port), host, contexts, self._threads, self._spare)
        return line

    def close(self) -> None:
        """Does not wait for calls that hang."""
        for line in self._lines.values():
            self._threads.submit(line.close)
        self._threads.shutdown(wait=False)


@functools.cache
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()
