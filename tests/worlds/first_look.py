"""What somebody does who tries zerowake: opens the page, asks a model of which nothing runs, and finds that start on the page."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import aiohttp

from tests.worlds.browser import Browser

PATIENCE_SECONDS = 120.0  # for the answer; a cold start takes seconds


@dataclass(frozen=True)
class Look:
    """Seconds of each step, and what the page shows in the end: the names of the phases, from the first to the last."""

    opened: float
    answered: float
    shown: float
    origin: str
    phases: tuple[str, ...]


async def first_look(browser: Browser, page: str, gateway: str, model: str) -> Look:
    """page, gateway: their URLs. Waits until the waterfall of the very request that it sends is drawn."""
    began = time.monotonic()
    async with browser.tab(page) as tab:
        await tab.until("document.querySelector('#models-table tbody tr')")
        opened = time.monotonic()
        body = {"model": model, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 16}
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_SECONDS)) as http,
            http.post(f"{gateway}/v1/chat/completions", json=body) as response,
        ):
            assert response.status == 200, await response.text()
            assert (await response.json())["choices"][0]["message"]["content"]
            name, origin = response.headers["X-Zerowake-Activation"], response.headers["X-Zerowake-Origin"]
        answered = time.monotonic()
        start = (
            "[...document.querySelectorAll('#starts-list details')]"
            f".find(each => each.querySelector('.why').textContent.includes({json.dumps(f'activation {name}')}))"
        )
        await tab.until(f"{start} && {start}.querySelector('.badge').textContent === {json.dumps(origin)}")
        await tab.evaluate(f"{start}.open = true")
        await tab.until(f"{start}.querySelectorAll('tbody tr .lane').length > 2")
        phases = await tab.evaluate(f"[...{start}.querySelectorAll('tbody th')].map(each => each.textContent)")
        shown = time.monotonic()
        assert tab.errors == []
    return Look(opened - began, answered - opened, shown - answered, origin, tuple(phases))
