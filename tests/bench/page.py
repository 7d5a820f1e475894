"""The page with 1,000 nodes and 200 models, in a real Chromium on this machine: until it is there, and what each change costs.

Each node has 20 images, and 50 of them have something on its way. The first figure is from the beginning of the navigation until the first
rows are painted, with everything that is loaded for them. A change is that of half a second: bytes on their way, free memory of a hundred
nodes, requests in flight of a hundred models; its milliseconds are all that the page's thread was busy with, from the event to the paint.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from scaler.page.changes import changes
from scaler.view.state import State, encoded
from tests.bench.figures import Figure
from tests.worlds import shown_state
from tests.worlds.browser import CHROMIUM, Browser, Tab, chromium
from tests.worlds.shown_page import ShownPage, shown_page

NODES, MODELS, IMAGES = 1000, 200, 20
ROUNDS, CHANGES = 5, 10
_PAINTED = (
    "new Promise(done => {"
    " const look = () => document.querySelector('#nodes-table tbody tr') && document.querySelector('#models-table tbody tr')"
    " ? requestAnimationFrame(() => setTimeout(() => done(performance.now()))) : requestAnimationFrame(look);"
    " look(); })"
)


def unavailable() -> str:
    return "" if CHROMIUM else "needs Chromium: `make browser` brings it"


async def main() -> list[Figure]:
    state = shown_state.state(NODES, MODELS, IMAGES)
    async with shown_page(state) as page, chromium() as browser:
        renders = [await _render(browser, page) for _ in range(ROUNDS)]
        async with browser.tab(page.url) as tab:
            await tab.evaluate(_PAINTED)
            few = [await _change(tab, page) for _ in range(CHANGES)]
            await tab.evaluate("document.querySelector('#nodes-more').click(); document.querySelector('#models-more').click()")
            await tab.evaluate("document.querySelector('#nodes').scrollIntoView()")
            await tab.until("document.querySelector('#nodes-table .chip')")
            all_rows = [await _change(tab, page) for _ in range(CHANGES)]
        told = changes(state, shown_state.moved(state, 0.5))
    of = f"{NODES:,} nodes × {MODELS} models"
    return [
        Figure(f"the page with {of}: from the navigation to the first paint of its rows", median(renders), "ms", at_most=1000.0),
        Figure(f"the page with {of}: a change, in the browser", median(few), "ms", at_most=50.0),
        Figure(f"the page with {of}, all rows of both tables asked for: a change", median(all_rows), "ms", at_most=50.0),
        Figure("the same: the whole state, as it is sent once", len(encoded(state)) / 1e6, "MB"),
        Figure("the same: a change, as it is sent", len(encoded(told)) / 1e3, "kB"),
    ]


async def _render(browser: Browser, page: ShownPage) -> float:
    async with browser.tab(page.url) as tab:
        return float(await tab.evaluate(_PAINTED))


async def _change(tab: Tab, page: ShownPage) -> float:
    """Milliseconds of the page's thread."""
    await tab.call("Performance.enable")
    busy = await _busy(tab)
    mark = f"change {page.state.at}"

    def moved(state: State) -> State:
        return replace(shown_state.moved(state, 0.5), instance=mark)

    page.change(moved)
    await tab.evaluate(
        "new Promise(done => { const look = () => document.querySelector('#teller').textContent.includes("
        f"'{mark}') ? requestAnimationFrame(() => setTimeout(done)) : setTimeout(look, 100); look(); }})"
    )
    return (await _busy(tab) - busy) * 1000


async def _busy(tab: Tab) -> float:
    metrics = (await tab.call("Performance.getMetrics"))["metrics"]
    return float(next(each["value"] for each in metrics if each["name"] == "ThreadTime"))
