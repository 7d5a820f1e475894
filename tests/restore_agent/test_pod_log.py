"""What a container's log says, in the form in which container runtimes write it, and while they still write."""

from __future__ import annotations

import asyncio
from pathlib import Path

from restore_agent.kubernetes.pod_log import last_lines

LOG = "/var/log/pods/team_one_uid/engine/0.log"


def written(root: Path, text: str) -> Path:
    path = root / LOG.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)
    return path


async def test_lines_are_put_together_again(tmp_path: Path) -> None:
    lines = ("stdout F one", "stderr P two ", "stderr F halves", "stdout F", "stdout P cut off")
    written(tmp_path, "".join(f"2026-11-27T18:09:36.1Z {line}\n" for line in lines))
    assert await last_lines(LOG, tmp_path) == ["one", "two halves", "", "cut off"]


async def test_the_end_of_a_long_log(tmp_path: Path) -> None:
    written(tmp_path, "".join(f"2026-11-27T18:09:36.1Z stdout F {number}\n" for number in range(20_000)))
    found = await last_lines(LOG, tmp_path)
    assert found[-1] == "19999" and list(found) == [str(number) for number in range(20_000 - len(found), 20_000)]


async def test_what_is_written_meanwhile_is_waited_for(tmp_path: Path) -> None:
    written(tmp_path, "t stdout F first\n")
    asked = asyncio.create_task(last_lines(LOG, tmp_path))
    await asyncio.sleep(0.1)
    written(tmp_path, "t stderr F ValueError: no room\n")
    assert (await asked)[-1] == "ValueError: no room"


async def test_no_log_is_no_line(tmp_path: Path) -> None:
    assert not await last_lines(LOG, tmp_path)
    assert not await last_lines("", tmp_path)
