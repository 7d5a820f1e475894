"""Each test that asks for `vllm` or `sglang` is run for every released version that people may have."""

from __future__ import annotations

import pytest

from tests.engines.releases import SERIES, NotReachable, released


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for project in SERIES.keys() & set(metafunc.fixturenames):
        try:
            metafunc.parametrize(project, released(project), ids=str)
        except NotReachable as error:
            raise pytest.Collector.CollectError(str(error)) from error
