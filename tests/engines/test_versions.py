"""The table of versions in restore_agent/README.md: no version stands there that was not looked at, and none is left out."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from packaging.version import Version

from tests.engines.releases import SERIES, Release, released

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


def check(release: Release) -> None:
    if is_new(release):
        warnings.warn(f"{release} has come out: where these tests pass, give it a row in {PAGE.name}", stacklevel=1)
    else:
        assert [row for row in table(release.project) if row[0] <= series_of(release) <= row[1]], f"{release} has no row in {PAGE}"


def test_every_vllm_has_its_row(vllm: Release) -> None:
    check(vllm)


def test_every_sglang_has_its_row(sglang: Release) -> None:
    check(sglang)


@pytest.mark.parametrize("project", SERIES)
def test_rows_are_of_versions_that_were_looked_at(project: str) -> None:
    _, parts = SERIES[project]
    there = {Version(".".join(map(str, each.version.release[:parts]))) for each in released(project)}
    rows = table(project)
    assert rows and {end for row in rows for end in row} <= there
