"""Seconds by rung are those that were measured, for an 8B model of 16 GB."""

from __future__ import annotations

import pytest

from scaler.simulate.rungs import NAMES, Rungs

GIVEN = dict(disk=5e9, peer=10e9, store=2e9, pinned=55e9, overhead=0.36, fill_seconds=0.26, parked_overhead=0.04)


@pytest.mark.parametrize(
    ("rung", "size", "seconds"),
    [("gpu", 16e9, 0.62), ("host", 16e9, 0.65), ("host", 70e9, 1.63), ("peer", 16e9, 1.96), ("disk", 16e9, 3.56), ("remote", 70e9, 14.36)],
)
def test_seconds_of_each_rung(rung: str, size: float, seconds: float) -> None:
    assert Rungs(**GIVEN).seconds(NAMES.index(rung), size) == pytest.approx(seconds, abs=0.006)


def test_with_parked_engines_host_memory_has_standbys() -> None:
    rungs = Rungs(**GIVEN, parked_bytes=1.6e9)
    assert rungs.seconds(rungs.gpu, 16e9) == pytest.approx(0.04)
    assert rungs.seconds(rungs.host, 16e9) == pytest.approx(0.36 + 16 / 55)


def test_what_a_store_alone_has_comes_at_its_rate() -> None:
    rungs = Rungs(**GIVEN, stored_only=True)
    assert rungs.reading(rungs.remote, 16e9) == 8
