"""The table of versions in restore_agent/README.md: no version stands there that was not looked at, and none is left out."""

from __future__ import annotations

import warnings

import pytest
from packaging.version import Version

from tests.engines.releases import SERIES, Release, released
from tests.engines.version_table import PAGE, is_new, series_of, table


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
