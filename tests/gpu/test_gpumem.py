"""What tests/bench/gpu/measure.py shows, as tests: that it is right, not how fast it is."""

from pathlib import Path

import pytest

from gpumem.hardware.devices import devices
from gpumem.hardware.memory import HOST
from tests.bench.gpu.measure import sections


@pytest.mark.parametrize("device", [HOST, pytest.param("gpu", marks=pytest.mark.gpu)])
def test_everything_that_is_promised(tmp_path: Path, device: str) -> None:
    names = [figure.name for section in sections(tmp_path, HOST if device == HOST else devices()[0]) for figure in section]
    assert len(names) == len(set(names)) > 8
