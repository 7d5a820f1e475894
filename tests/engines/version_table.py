"""The table in restore_agent/README.md: which versions of engines were looked at."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.version import Version

from tests.engines.releases import SERIES, Release

PAGE = Path(__file__).parents[2] / "restore_agent/README.md"


def table(project: str) -> list[tuple[Version, Version]]:
    """The first and the last version of each row."""
    rows = re.findall(r"^\| (\w+) ([\d.]+)(?: to ([\d.]+))? \| yes \|", PAGE.read_text(), re.MULTILINE)
    return [(Version(first), Version(last or first)) for engine, first, last in rows if engine.lower() == project]


def series_of(release: Release) -> Version:
    return Version(".".join(map(str, release.version.release[: SERIES[release.project][1]])))


def is_new(release: Release) -> bool:
    """It has come out since the table was written."""
    return series_of(release) > max((last for _, last in table(release.project)), default=Version("0"))
