"""Whether a server is well, by a path that it answers with 200."""

from __future__ import annotations

import aiohttp


async def is_well(client: aiohttp.ClientSession, url: str) -> bool:
    """False, too, where nobody listens, or hangs up."""
    try:
        async with client.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False
