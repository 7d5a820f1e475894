"""The page over a state that a test makes and changes, as the scaler serves it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from scaler.page.site import Site
from scaler.view.metrics import serve_metrics
from scaler.view.state import State


class ShownPage:
    """url: its address. `change` gives it another state, made of the one before."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.url = ""

    async def read(self) -> State:
        return self.state

    def change(self, to: Callable[[State], State]) -> None:
        self.state = to(self.state)


@asynccontextmanager
async def shown_page(state: State) -> AsyncIterator[ShownPage]:
    page = ShownPage(state)
    site = Site(page.read)
    async with serve_metrics("127.0.0.1", 0, lambda: "", routes=site.routes) as (host, port), site.running():
        page.url = f"http://{host}:{port}/"
        yield page
