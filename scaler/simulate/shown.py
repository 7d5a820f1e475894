"""What came of a comparison, for people and for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from scaler.simulate.comparison import Outcome
from zerowake_shared import tables

_RUNGS = {"parked": "PARKED", "gpu": "GPU", "host": "HOST", "peer": "PEER", "disk": "DISK", "remote": "REMOTE"}


def as_json(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """As Outcome has it, and what each GiB more than the row before it of the same policy bought."""
    return [{**dataclasses.asdict(each), "seconds_saved_a_gib": saved} for each, saved in zip(found, _bought(found), strict=True)]


def as_table(found: Sequence[Outcome]) -> Table:
    """One row for each policy and host memory; rungs that nothing was served from are left out."""
    rungs = [name for name in _RUNGS if any(each.rungs[name] for each in found)]
    swept = len({each.host_bytes for each in found}) > 1
    bought = ["SAVED A GIB"] if swept else []
    shown = ["HOST MEMORY", "POLICY", "IN MEMORY", "MEAN", "P50", "P99", *(_RUNGS[name] for name in rungs)]
    made = tables.table(*shown, "GPU HOURS", "LOADED", "AHEAD", "WASTED", *bought)
    for each, saved in zip(found, _bought(found), strict=True):
        seconds = (f"{value:.2f} s" for value in (each.mean_seconds, each.p50_seconds, each.p99_seconds))
        shares = (f"{each.rungs[name]:.1%}" for name in rungs)
        moved = (f"{size / 2**40:.1f} TiB" for size in (each.loaded_bytes, each.ahead_bytes, each.wasted_bytes))
        cost = f"{each.gpu_hours_of_always_on:.1%}"
        more = [f"{saved:.3g} s" if saved is not None else "-"] if swept else []
        made.add_row(f"{each.host_bytes / 2**30:.0f} GiB", each.policy, f"{each.in_memory:.1%}", *seconds, *shares, cost, *moved, *more)
    return made


def _bought(found: Sequence[Outcome]) -> list[float | None]:
    """Seconds that all scored requests together waited less, for each GiB of host memory more than that policy's row before."""
    before: dict[str, Outcome] = {}
    saved: list[float | None] = []
    for each in found:
        last = before.get(each.policy)
        more = (each.host_bytes - last.host_bytes) / 2**30 if last else 0.0
        saved.append((last.mean_seconds - each.mean_seconds) * each.scale_ups / more if last and more else None)
        before[each.policy] = each
    return saved
