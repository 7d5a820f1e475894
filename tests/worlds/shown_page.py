"""The page over a state that a test makes and changes, as the scaler serves it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from scaler.page.site import serve_shown
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
async def shown_page(state: State, port: int = 0) -> AsyncIterator[ShownPage]:
    """port: 0: any."""
    page = ShownPage(state)
    async with serve_shown("127.0.0.1", port, lambda: "", page.read, page=True) as (host, bound):
        page.url = f"http://{host}:{bound}/"
        yield page
