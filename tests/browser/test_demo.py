"""The last part of a stranger's path, with the demo's chat model: the page is open, a request is made from zero, and its start is there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.worlds.browser import Browser
from tests.worlds.command import zerowake
from tests.worlds.demo_engine import ENGINES
from tests.worlds.first_look import first_look
from tests.worlds.machine import machine

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for CRIU and namespaces"),
]
MODEL, PORT = "smollm2", "8000"


async def test_the_waterfall_of_the_request_just_made(browser: Browser, tmp_path: Path) -> None:
    state = tmp_path / "state"
    command = [sys.executable, str(ENGINES / "chat.py"), "--port", PORT]
    await zerowake("snapshot", "create", MODEL, "--state", str(state), "--port", PORT, "--", *command)
    model = {"snapshot": MODEL, "command": command, "port": int(PORT)}
    async with machine(state, {MODEL: model}) as made:
        look = await first_look(browser, f"http://127.0.0.1:{made.ports['scaler']}/", f"http://127.0.0.1:{made.ports['gateway']}", MODEL)
    assert look.origin == "restored"
    assert {"held", "image", "first byte"} <= set(look.phases)
    assert (look.phases[0], look.phases[-1] in ("first byte", "unaccounted")) == ("held", True)
