"""Every term of one model's chance: its own idle times, those of all models, the hour, the weekday, and what the forecast has earned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaler.forecast.forecast import Forecast
from scaler.forecast.idle_times import LOWER, UPPER, bins_of, pooled, seconds_in_bins
from scaler.forecast.seasons import SEASONS


@dataclass(frozen=True, slots=True)
class Explained:
    """chance: of a request within `within_seconds`; 1 while it is asked for.

    idle_seconds: since its last request ended; 0: it is asked for. Idle times that are as long as this one (`as_long_seconds`: from, to;
    None: no end) count: own_ends: how many of its own ended so; own_per_second: the same by the seconds that they lasted there; pooled:
    of all models. per_second: both together. seasons: by how much it is likelier at this hour, and on this weekday, and whether that
    counts. credit_nats: by which the forecast of it was better than its mean rate of late; all_credit_nats: of all models together.
    """

    within_seconds: float
    chance: float
    idle_seconds: float
    as_long_seconds: tuple[float, float | None]
    own_ends: float
    own_per_second: float
    pooled_per_second: float
    per_second: float
    seasons: dict[str, tuple[float, bool]]
    credit_nats: float
    all_credit_nats: float


def explained(forecast: Forecast, model: str, at: float, within: float) -> Explained | None:
    """None: the forecast does not know the model. at: wall-clock seconds since 1970."""
    state = forecast.state()
    if model not in state.models:
        return None
    place, rows = state.models.index(model), state.rows
    row = rows[place]
    idle = np.maximum(at - rows["since"], 0.0)
    seconds = rows["seconds"] + seconds_in_bins(idle)
    here = int(bins_of(idle[place : place + 1])[0])
    own_ends, own_seconds = float(row["ended"][here]), float(seconds[place, here])
    names, rates = forecast.hazards(at)
    upper = float(UPPER[here])
    return Explained(
        within_seconds=within,
        chance=forecast.chances(at, within)[model],
        idle_seconds=float(idle[place]),
        as_long_seconds=(float(LOWER[here]), None if np.isinf(upper) else upper),
        own_ends=own_ends,
        own_per_second=own_ends / own_seconds if own_seconds else 0.0,
        pooled_per_second=float(pooled(rows["ended"], seconds)[here]),
        per_second=float(rates[names.index(model)]),
        seasons={each.name: (float(each.factors(rows, at)[place]), bool(each.counting(rows)[place])) for each in SEASONS},
        credit_nats=float(row["credit"]),
        all_credit_nats=float(rows["credit"].sum()),
    )
