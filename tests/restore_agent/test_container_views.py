"""What the agent holds open of a container: what it asked for, for as long as it needs it, and nothing of a tenant's choice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from restore_agent.places.container import Container
from restore_agent.places.container_error import ContainerError
from restore_agent.places.container_views import ContainerViews
from tests.worlds.captured import ADDRESS, IMAGE
from tests.worlds.containers import Callers, container

pytestmark = pytest.mark.usefixtures("needs_criu", "needs_runc")


async def test_the_root_can_be_closed_before_the_control_directory(callers: Callers, tmp_path: Path) -> None:
    async with container(tmp_path / "two", callers.folder) as two:
        views = ContainerViews(await callers.next())
        assert not views.is_open
        await views.open()
        two.execute("sh", "-c", "echo theirs >/etc/word && echo said >/run/zerowake/control/word")
        assert (views.root / "etc/word").read_text() == "theirs\n"
        views.close(but=1)
        assert (views.control_directory / "word").read_text() == "said\n" and views.is_open
        number = int(views.root.name)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)
        views.close()
        assert not views.is_open


async def test_a_moved_control_directory_is_an_error(callers: Callers, tmp_path: Path) -> None:
    async with container(tmp_path / "two", callers.folder) as two:
        two.execute("sh", "-c", "mv /run/zerowake /run/away && ln -s /etc /run/zerowake")
        with pytest.raises(ContainerError, match="/run/zerowake/control"):
            await Container(await callers.next(), IMAGE, [ADDRESS]).open()


async def test_of_a_container_that_has_ended_nothing_is_opened(callers: Callers, tmp_path: Path) -> None:
    async with container(tmp_path / "two", callers.folder) as two:
        placeholder = await callers.next()
        two.kill("KILL")
        await placeholder.ended
    with pytest.raises(ContainerError, match=r"cannot open / of the container: .*No such process"):
        await ContainerViews(placeholder).open()
