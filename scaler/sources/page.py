"""A page of another program, asked for over a connection that is kept."""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp

from scaler.gateway.upstream import Endpoint
from scaler.sources.source import SourceError
from zerowake_shared.network_namespace import NetworkNamespace
from zerowake_shared.one_line import described


class Page:
    """One URL. most_bytes: what its answer may have; netns: the path of the network namespace to ask from; empty: our own."""

    def __init__(self, url: str, most_bytes: int, netns: str = "") -> None:
        self._url = url
        self._most = most_bytes
        self._netns = netns
        self._namespace: NetworkNamespace | None = None
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def of(cls, endpoint: Endpoint, path: str, most_bytes: int) -> Page:
        """A replica's."""
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        return cls(f"http://{host}:{endpoint.port}{path}", most_bytes, endpoint.netns)

    async def get(self, form: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        """Its status and body; posted to with a form, if one is given. Without a deadline: whoever asks has one. Raises: SourceError."""
        body = bytearray()
        try:
            if self._session is None:
                self._session = aiohttp.ClientSession(connector=self._connector(), timeout=aiohttp.ClientTimeout(total=None))
            async with self._session.request("GET" if form is None else "POST", self._url, data=form) as response:
                async for piece in response.content.iter_any():
                    body += piece
                    if len(body) > self._most:
                        raise SourceError(f"{self._url} answers with more than {self._most} bytes")
                return response.status, bytes(body)
        except (aiohttp.ClientError, OSError) as error:
            raise SourceError(described(error)) from None

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()
        namespace, self._namespace = self._namespace, None
        if namespace is not None:
            namespace.close()

    def _connector(self) -> aiohttp.TCPConnector:
        if not self._netns:
            return aiohttp.TCPConnector()
        namespace = self._namespace = NetworkNamespace(self._netns)
        return aiohttp.TCPConnector(socket_factory=lambda info: namespace.socket(*info[:3]))
