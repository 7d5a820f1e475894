"""Demand that waits in Redis: a list's length, a stream's, or what a group of consumers has left of a stream.

A list or stream that does not exist is an empty one: Redis removes a list with its last element. A group that does not exist is an error,
as nothing is known of what it has read. Of a group counts what it has not been given yet (lag) and what it was given and has not
acknowledged (pending): a consumer that asks this gateway for what it was given has its request counted twice until it acknowledges. A list
is never so: what was taken from it is in it no more.
Passwords are read for each connection, so that a new one counts.
Rejected: the tries again that `redis.asyncio` makes by itself, which would hide how long a server has been silent.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import RedisError

from scaler.sources.redis_declaration import RedisDeclaration
from scaler.sources.source import Lookup, Reading, SourceError, whole
from zerowake_shared.one_line import described

_PORT = 6379


class _Password(CredentialProvider):
    """Read anew for each connection."""

    def __init__(self, declared: RedisDeclaration) -> None:
        self._declared = declared

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        declared = self._declared
        try:
            password = declared.password_file.read_text().strip() if declared.password_file else os.environ[declared.password_env]
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"the password cannot be read from {declared.password_file}: {described(error)}") from None
        user = urlsplit(declared.url).username
        return (user, password) if user else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return await asyncio.to_thread(self.get_credentials)


class RedisLength:
    """The length of one key, over a connection that is kept until it fails."""

    def __init__(self, declared: RedisDeclaration, lookup: Lookup | None) -> None:
        self._declared = declared
        self._lookup = lookup
        self._client: Redis | None = None

    async def read(self) -> Reading:
        if self._client is None:
            self._client = self._connected(await self._url())
        try:
            length = await self._length(self._client)
        except BaseException as error:
            await self.close()  # an answer that comes late would be taken for the next one's
            if isinstance(error, RedisError | OSError):
                raise SourceError(described(error)) from None
            raise
        return Reading(length)

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _url(self) -> str:
        """With the address in it that its host was found at. A certificate is of a name, which then stays."""
        parts = urlsplit(self._declared.url)
        if self._lookup is None or parts.scheme != "redis":
            return self._declared.url
        address, *_ = await self._lookup(parts.hostname or "")
        host = f"[{address}]" if ":" in address else address
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}{host}:{parts.port or _PORT}"))

    def _connected(self, url: str) -> Redis:
        declared = self._declared
        provider = _Password(declared) if declared.password_file or declared.password_env else None
        return Redis.from_url(
            _without_user(url) if provider else url,
            single_connection_client=True,
            protocol=2,  # which servers of any age speak, and what stands before them
            decode_responses=True,
            socket_timeout=None,  # whoever reads has a deadline
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
            credential_provider=provider,
        )

    async def _length(self, client: Redis) -> int:
        declared = self._declared
        if declared.list:
            return _counted(await cast("Any", client.llen(declared.list)))
        if not declared.group:
            return _counted(await cast("Any", client.xlen(declared.stream)))
        groups = cast("Any", await client.xinfo_groups(declared.stream))
        group = next((each for each in groups if each["name"] == declared.group), None)
        if group is None:
            raise SourceError(f"stream {declared.stream} has no group {declared.group}")
        if group.get("lag") is None:
            raise SourceError(
                f"Redis does not say how much of stream {declared.stream} group {declared.group} has left: entries were deleted that it had"
                " not read, or the server is older than 7.0"
            )
        return _counted(group["lag"]) + _counted(group["pending"])


def _counted(said: object) -> int:
    if not isinstance(said, int):
        raise SourceError(f"{said!r} is no length")
    return whole(said, str(said))


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
