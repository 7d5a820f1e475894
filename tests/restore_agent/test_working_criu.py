"""CRIU is tried as an agent starts: what lacks for a moment costs a moment, and what lacks for good is said once."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from restore_agent.drivers.criu import Criu
from restore_agent.places.place import PlaceError
from restore_agent.places.sandbox import Sandbox
from restore_agent.places.sandboxes import Sandboxes
from restore_agent.sequences import working_criu as module
from restore_agent.sequences.node import Node
from restore_agent.service import metrics

pytestmark = pytest.mark.usefixtures("needs_criu")


@pytest.mark.parametrize(("number", "fails", "works"), [(errno.EMFILE, 2, True), (errno.ENOSPC, 100, False), (errno.EPERM, 1, False)])
async def test_what_lacks_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int, fails: int, works: bool
) -> None:
    monkeypatch.setattr(module, "_LAST_PAUSE", 0.2)
    create, left = Sandboxes.create, fails

    async def fail_at_first(sandboxes: Sandboxes) -> Sandbox:
        nonlocal left
        left -= 1
        if left >= 0:
            raise PlaceError("no sandbox") from OSError(number, "so it is")
        return await create(sandboxes)

    monkeypatch.setattr(Sandboxes, "create", fail_at_first)
    async with Node.open("test", tmp_path / "state", tmp_path / "memory", tmp_path / "gpumem.sock", metrics) as node:
        assert isinstance(node.criu, Criu) is works
    assert ("engines are started cold: no sandbox" in caplog.text) is not works
