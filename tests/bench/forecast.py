"""What a forecast of 10,000 models costs: a minute of it, and the answers that a planner asks for. One core, all in this process."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from functools import partial

from scaler.forecast.forecast import STATEMENT_SECONDS, Forecast
from tests.bench.figures import Figure

MODELS = 10_000
HISTORY = 20  # idle times of each model before anything is measured
MINUTES = 60
BEGIN = 1_800_000_000.0


def main() -> list[Figure]:
    forecast, chance = Forecast(), random.Random(1)
    models = [f"team-{number % 100}/model-{number}" for number in range(MODELS)]
    for model in models:
        forecast.declare(model, BEGIN)
    at = BEGIN
    for _ in range(HISTORY):
        at += 600.0
        for model in models:
            began = at + chance.random()
            forecast.began(model, began)
            forecast.ended(model, began + 1.0)
    events, minutes = list[float](), list[float]()
    for _ in range(MINUTES):
        at += STATEMENT_SECONDS
        asked = chance.sample(models, MODELS // 10)
        begin = time.process_time()
        for model in asked:
            forecast.began(model, at - 2.0)
            forecast.ended(model, at - 1.0)
        events.append((time.process_time() - begin) / (2 * len(asked)))
        minutes.append(seconds_of(partial(forecast.judge, at)))
    detail = f"{MODELS} models, each tenth asked for in each minute; median of {MINUTES}"
    return [
        Figure("a minute of the forecast: judged, learned, stated", statistics.median(minutes) * 1e3, "ms", at_most=1000.0, detail=detail),
        Figure("one event of a model", statistics.median(events) * 1e6, "µs", detail="a request begins, or the last one ends"),
        Figure("hazards of all", median(lambda: forecast.hazards(at)), "ms", detail="as a planner asks"),
        Figure("chances of all within an hour", median(lambda: forecast.chances(at, 3600.0)), "ms"),
        Figure("what it keeps in memory", forecast.state().rows.nbytes / 1e6, "MB"),
    ]


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def median(work: Callable[[], object]) -> float:
    """Milliseconds of processor time."""
    return statistics.median(seconds_of(work) for _ in range(21)) * 1e3
