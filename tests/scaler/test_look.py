"""A start waits for the look at its snapshot, and for what has to come back."""

from __future__ import annotations

import asyncio

from scaler.local.look import Look


async def test_a_start_waits_for_the_look_and_for_the_way_back() -> None:
    look = Look()
    waiting = asyncio.create_task(look.is_over())
    await asyncio.sleep(0)
    assert not waiting.done()
    look.done.set()
    await waiting
    here = asyncio.Event()
    look.bring = here.wait
    waiting = asyncio.create_task(look.is_over())
    await asyncio.sleep(0)
    assert not waiting.done()
    here.set()
    await waiting
