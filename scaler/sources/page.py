"""A page of another program, asked for over a connection that is kept."""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp

from scaler.sources.source import SourceError
from zerowake_shared.one_line import described


class Page:
    """One URL. most_bytes: what its answer may have."""

    def __init__(self, url: str, most_bytes: int) -> None:
        self._url = url
        self._most = most_bytes
        self._session: aiohttp.ClientSession | None = None

    async def get(self, form: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        """Its status and body; posted to with a form, if one is given. Without a deadline: whoever asks has one. Raises: SourceError."""
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        body = bytearray()
        try:
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
