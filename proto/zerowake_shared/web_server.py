"""A web application that is served at an address until a block ends."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator

from aiohttp import web

from zerowake_shared.address import Address
from zerowake_shared.listening import started


@contextlib.asynccontextmanager
async def served(app: web.Application, host: str, port: int, who: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[str, int]]:
    """Yields the bound address (port 0: any). who: what the server is to people, as in "the webhook". Raises: CannotListen."""
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        await started(web.TCPSite(runner, host, port, ssl_context=tls), Address(host, port), who)
        bound = runner.addresses[0]
        yield bound[0], bound[1]
    finally:
        await runner.cleanup()
