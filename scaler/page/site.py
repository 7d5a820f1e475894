"""The page's address: `/`, its parts below `/page/`, and the stream at `/events`. It shows, and can be told nothing.

It stands beside the metrics, and so behind what guards those: an address of this machine alone, or a network policy. What it shows was
named by users. So nothing of it is ever read as HTML: the page's own scripts are the only ones that its policy lets run, and those may not
make elements of text (`require-trusted-types-for`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

from aiohttp import web

from scaler.page.feed import Feed, TooManyListeners
from scaler.view.metrics import serve_metrics
from scaler.view.state import State
from zerowake_shared.address import Address

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # kept, and asked for again: a newer scaler has a newer page
}
# A browser that takes nothing for so long has gone, or is stopped.
_PATIENCE_SECONDS = 30.0


@contextlib.asynccontextmanager
async def serve_shown(
    host: str,
    port: int,
    ready: Callable[[], str],
    read: Callable[[], Awaitable[State]],
    *,
    page: bool,
    routes: Iterable[web.RouteDef] = (),
) -> AsyncIterator[tuple[str, int]]:
    """All that is shown at one address until the block ends: metrics (view/metrics.py), and with `page` the page. Yields the address.

    Raises: CannotListen.
    """
    site = Site(read)
    async with serve_metrics(host, port, ready, routes=[*routes, *(site.routes if page else ())]) as bound, site.running():
        if page:
            log.info("the page is at http://%s/", Address(*bound))
        yield bound


class Site:
    """read: the state now (feed.py). Its routes answer once it is `running`."""

    def __init__(self, read: Callable[[], Awaitable[State]]) -> None:
        self._feed = Feed(read)
        parts = [web.get(f"/page/{path.name}", _file(path)) for path in sorted(_HERE.iterdir()) if path.suffix in _TYPES]
        self.routes = [web.get("/", _file(_HERE / "page.html")), *parts, web.get("/events", self._events)]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Until the block ends, and all streams with it: a server that ends waits for them."""
        async with self._feed.running():
            yield

    async def _events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=_HEADERS | {"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        response.content_type = "text/event-stream"
        try:
            async with contextlib.aclosing(self._feed.listen()) as frames:
                async for frame in frames:
                    if not response.prepared:
                        await response.prepare(request)
                    async with asyncio.timeout(_PATIENCE_SECONDS):
                        await response.write(frame)
        except TooManyListeners as error:
            return web.Response(status=503, text=f"{error}: close one of them\n", headers=_HEADERS | {"Retry-After": "10"})
        except TimeoutError:
            log.info("a browser at %s took nothing of the page's events for %.0f s, and is cut", request.remote, _PATIENCE_SECONDS)
            if request.transport is not None:
                request.transport.abort()
        except ConnectionResetError:
            pass  # it has gone
        return response


def _file(path: Path) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    kind = _TYPES.get(path.suffix, "text/html")

    async def answer(_: web.Request) -> web.FileResponse:
        return web.FileResponse(path, headers=_HEADERS | {"Content-Type": f"{kind}; charset=utf-8"})

    return answer
