"""Each test that asks for `vllm` or `sglang` is run for every released version that people may have.

Of a version that came out after the table in restore_agent/README.md was written nobody has said that it fits: what is found there is
shown, and fails nothing. Else a change that touches no engine would fail on the day of a release.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.releases import SERIES, NotReachable, Release, released
from tests.engines.version_table import is_new


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for project in SERIES.keys() & set(metafunc.fixturenames):
        try:
            metafunc.parametrize(project, [_expected(each) for each in released(project)], ids=str)
        except NotReachable as error:
            raise pytest.Collector.CollectError(str(error)) from error


def _expected(release: Release) -> Any:
    new = pytest.mark.xfail(reason=f"{release} came out after the table in restore_agent/README.md was written")
    return pytest.param(release, marks=new if is_new(release) else ())
