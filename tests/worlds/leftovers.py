"""What an agent leaves on the machine, which must be nothing."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from tests.worlds.waiting import until

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def left_behind(state: Path, *, but_ready: bool = False) -> list[str]:
    """What an ended agent over this state folder must not leave: processes, namespaces (they live as long as those), mounts.

    but_ready: an agent that runs has an empty sandbox ready for the next restore, which does not count.
    """
    found = []
    inits: dict[str, list[str]] = {}  # by their pid namespace; a sandbox has one outside of it, too
    inside: dict[str, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                namespace = str((folder / "ns/pid").readlink())
                inside[namespace] = inside.get(namespace, 0) + 1
                # CRIU and the engines live in sandboxes: where no init is left, neither are they.
                if "sandbox-init" in words and str(state) in words:
                    inits.setdefault(namespace, []).append(f"process {folder.name}: {words}")
    ours = str(Path("/proc/self/ns/pid").readlink())
    empty = [namespace for namespace in inits if namespace != ours and inside[namespace] == 1]
    if but_ready and len(empty) == len(inits.keys() - {ours}) == 1:
        inits.clear()
    for lines in inits.values():
        found += lines
    found += [f"mount {line}" for line in Path("/proc/self/mounts").read_text().splitlines() if str(state) in line]
    return found


async def nothing_left(state: Path) -> None:
    """Waits, with a deadline, until an agent that was killed has left nothing."""
    async with asyncio.timeout(10):
        while left_behind(state):
            await asyncio.sleep(0.02)  # the kernel is taking the pid namespaces down


def huge_pages() -> str:
    """The machine's switch for transparent huge pages, as it stands."""
    return _HUGE_PAGES.read_text().strip()


_AT_FIRST = huge_pages()  # read when tests are collected, before any of them runs


async def huge_pages_are_back() -> None:
    """Waits, with a deadline, for the switch to be what it was before the first test: agents of other tests may hold it on just now."""
    await until(lambda: huge_pages() == _AT_FIRST, f"the switch for huge pages is at {_AT_FIRST} again")
