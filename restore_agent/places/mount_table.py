"""The mounts of a process, as the kernel lists them in /proc/PID/mountinfo: the only file that reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Mount:
    """One line of the table."""

    id: int
    parent: int
    point: PurePosixPath  # as the process sees it
    kind: str  # the file system's: "ext4"
    flags: frozenset[str]  # of this mount: "ro", "nosuid", …
    options: str  # of the file system, as the kernel escapes them

    @property
    def writable(self) -> bool:
        return "ro" not in self.flags and "ro" not in self.options.split(",")

    def option(self, name: str) -> str | None:
        """What the file system's options say of `name`; None: nothing."""
        found = re.search(rf"(?:^|,){name}=((?:\\.|[^,\\])*)", self.options)
        return _unescaped(found[1]) if found else None


def read(pid: int | str = "self") -> list[Mount]:
    """Every mount, in the kernel's order. Raises OSError: the process has ended."""
    return list(parse(Path(f"/proc/{pid}/mountinfo").read_text()))


def parse(text: str) -> Iterator[Mount]:
    for line in text.splitlines():
        own, _, rest = line.partition(" - ")
        number, parent, _, _, point, flags, *_ = own.split(" ")
        kind, _, options = rest.split(" ", 2)
        yield Mount(int(number), int(parent), PurePosixPath(_unescaped(point)), kind, frozenset(flags.split(",")), options)


def visible(mounts: Iterable[Mount]) -> list[Mount]:
    """Those that a path can lead to, parents first: what lies beneath another mount is left out."""
    listed = list(mounts)
    numbers = {mount.id for mount in listed}
    children: dict[int, list[Mount]] = {}
    waiting: list[Mount] = []
    for mount in listed:
        if mount.parent in numbers - {mount.id}:
            children.setdefault(mount.parent, []).append(mount)
        elif mount.point == PurePosixPath("/"):
            waiting = [mount]
    found: list[Mount] = []
    while waiting:
        mount = waiting.pop()
        below = children.get(mount.id, [])
        over = [child for child in below if child.point == mount.point]
        if over:  # every path into the one beneath leads to this one
            waiting.append(over[-1])
            continue
        found.append(mount)
        points = {child.point for child in below}
        waiting += [child for child in below if points.isdisjoint(child.point.parents)]
    return sorted(found, key=lambda mount: mount.point.parts)


def _unescaped(text: str) -> str:
    text = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
    return re.sub(r"\\(.)", r"\1", text)
