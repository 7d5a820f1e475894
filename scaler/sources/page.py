"""A page of another program, asked for over a connection that is kept."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from scaler.gateway.upstream import Endpoint
from scaler.sources.source import Lookup, SourceError
from zerowake_shared.network_namespace import NetworkNamespace
from zerowake_shared.one_line import described

_SHOWN_CHARACTERS = 200


class Page:
    """One URL. most_bytes: what its answer may have; netns: the path of the network namespace to ask from; empty: our own. lookup: where
    its host is, as in Surroundings; with it no redirect is followed, which could lead anywhere. brief: the
    connection is closed after each answer."""

    def __init__(self, url: str, most_bytes: int, netns: str = "", lookup: Lookup | None = None, brief: bool = False) -> None:
        self._url = url
        self._most = most_bytes
        self._netns = netns
        self._lookup = lookup
        self._brief = brief
        self._namespace: NetworkNamespace | None = None
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def of(cls, endpoint: Endpoint, path: str, most_bytes: int, lookup: Lookup | None = None) -> Page:
        """A replica's. lookup: it is in a pod, whose engine does not sleep while it has a connection."""
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        return cls(f"http://{host}:{endpoint.port}{path}", most_bytes, endpoint.netns, lookup, brief=lookup is not None)

    async def get(self, form: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        """Its status and body; posted to with a form, if one is given. Without a deadline: whoever asks has one. Raises: SourceError."""
        body = bytearray()
        try:
            if self._session is None:
                self._session = aiohttp.ClientSession(connector=self._connector(), timeout=aiohttp.ClientTimeout(total=None))
            method = "GET" if form is None else "POST"
            async with self._session.request(method, self._url, data=form, allow_redirects=self._lookup is None) as response:
                if self._lookup and 300 <= response.status < 400:
                    there = response.headers.get("Location", "")[:_SHOWN_CHARACTERS]
                    raise SourceError(f"{self._url} redirects to {there!r}, which is not followed: name where it is")
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
            return aiohttp.TCPConnector(resolver=_Resolver(self._lookup) if self._lookup else None, force_close=self._brief)
        namespace = self._namespace = NetworkNamespace(self._netns)
        return aiohttp.TCPConnector(socket_factory=lambda info: namespace.socket(*info[:3]))


class _Resolver(AbstractResolver):
    """A lookup, as aiohttp asks for it."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        return [_result(host, address, port) for address in await self._lookup(host)]

    async def close(self) -> None:
        """It holds nothing."""


def _result(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=flags)
