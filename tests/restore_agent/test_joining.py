"""Programs of the node's that run inside a container: none that would run the container's own files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from restore_agent.places.container import Container
from restore_agent.places.container_error import ContainerError
from tests.worlds.captured import ADDRESS, IMAGE
from tests.worlds.containers import Callers, container

pytestmark = pytest.mark.usefixtures("needs_criu", "needs_runc")


async def test_a_program_with_libraries_is_never_run_inside(callers: Callers, tmp_path: Path) -> None:
    async with container(tmp_path / "two", callers.folder):
        place = await Container(await callers.next(), IMAGE, [ADDRESS]).open()
        with pytest.raises(ContainerError, match="linked dynamically"):
            await place.spawn([shutil.which("sleep") or "", "1"], {}, "/", [])
