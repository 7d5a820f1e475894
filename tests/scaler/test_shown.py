"""The table and the JSON of a comparison."""

from __future__ import annotations

import dataclasses

from rich.console import Console

from scaler.simulate.comparison import Outcome
from scaler.simulate.shown import as_json, as_table

ONE = Outcome(
    policy="lru",
    host_bytes=100 * 2**30,
    free_gpu_memory=True,
    scale_ups=1000,
    in_memory=0.75,
    mean_seconds=2.0,
    p50_seconds=0.6,
    p99_seconds=14.4,
    rungs={"parked": 0.0, "gpu": 0.5, "host": 0.25, "peer": 0.0, "disk": 0.25, "remote": 0.0},
    gpu_hours=10,
    gpu_hours_of_always_on=0.05,
    loaded_bytes=2**40,
    ahead_bytes=0,
    copied_bytes=0,
    wasted_bytes=0,
)
MORE = dataclasses.replace(ONE, host_bytes=200 * 2**30, mean_seconds=1.5)


def printed(*found: Outcome) -> list[str]:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(as_table(found))
    return captured.get().splitlines()


def test_a_row_for_each_and_no_column_for_rungs_that_nobody_used() -> None:
    heading, row = (" ".join(line.split()) for line in printed(ONE))
    assert heading == "HOST MEMORY POLICY IN MEMORY MEAN P50 P99 GPU HOST DISK GPU HOURS LOADED AHEAD WASTED"
    assert row == "100 GiB lru 75.0% 2.00 s 0.60 s 14.40 s 50.0% 25.0% 25.0% 5.0% 1.0 TiB 0.0 TiB 0.0 TiB"


def test_what_more_memory_bought() -> None:
    assert printed(ONE, MORE)[2].split()[-2:] == ["5", "s"]  # half a second, a thousand times, for 100 GiB
    assert [each["seconds_saved_a_gib"] for each in as_json([ONE, MORE])] == [None, 5.0]
