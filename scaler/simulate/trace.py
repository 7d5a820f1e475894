"""Requests of a trace, as arrays: when, for which model, and for how long each is worked on.

Three sources. A CSV of (time, model, tokens) is taken as it is. ServeGen's clients (a folder of CSVs, one client each: window start,
requests a second, coefficient of variation of the gaps, family, shape, scale) are made into as many models as are asked for: model number i
is client i modulo their number, shifted in time around the trace's end, and thinned: of its windows a share is kept, and of the requests in
each of these a share, at most so many a second. Of a thinned renewal process every k-th request is left, k geometric; k gaps of a gamma
distribution are one gamma gap with k times its shape, so that none of those left out has to be drawn. (A Weibull's gaps are taken for the
gamma of the same mean and variation.) As ServeGen has it, gaps are scaled so that they fill their window. The daily mix is made up: models
that are asked for around their own hour of the day, and hardly else.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_DAY = 86400.0
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class BadTrace(Exception):
    """The trace cannot be used; the message, of one line, names the file and the line."""


@dataclass(frozen=True)
class Trace:
    """models: their names. at: seconds from 0, rising. model: an index into models. tokens: of each request. seconds: its length."""

    models: list[str]
    at: Floats
    model: Ints
    tokens: Floats
    seconds: float


def read_csv(path: Path, known: Iterable[str] = ()) -> Trace:
    """Lines of (time in seconds, model, tokens), in any order; a first line that is no numbers is a heading. known: the models that there
    are; without any, those of the file.

    Raises: BadTrace.
    """
    number = {name: index for index, name in enumerate(known)}
    closed = bool(number)
    at, model, tokens = [], [], []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in (reader := csv.reader(file)):
                if not row or (reader.line_num == 1 and not _is_number(row[0])):
                    continue
                where = f"{path}, line {reader.line_num}"
                if len(row) != 3:
                    raise BadTrace(f"{where}: it has {len(row)} fields, not the three of time, model, tokens")
                when, name, count = (each.strip() for each in row)
                at.append(_number(when, "the time", where))
                tokens.append(_number(count, "the number of tokens", where))
                if not name or (closed and name not in number):
                    raise BadTrace(f"{where}: the model {name!r} is none of models.list" if name else f"{where}: the model is missing")
                model.append(number.setdefault(name, len(number)))
    except OSError as error:
        raise BadTrace(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadTrace(f"{path} is no CSV in UTF-8: {error}") from None
    if not at:
        raise BadTrace(f"{path} has no requests")
    times = np.array(at)
    order = np.argsort(times, kind="stable")
    times = times[order] - times[order[0]]
    return Trace(list(number), times, np.array(model)[order], np.array(tokens)[order], float(times[-1]) + 1)


def read_servegen(
    folder: Path, models: int, windows: float, requests: float, most_a_second: float, tokens: float, rng: np.random.Generator
) -> Trace:
    """So many models of the clients in the folder, each with its share of `windows` and of the `requests` in them, at most so many a
    second.

    Raises: BadTrace.
    """
    files = sorted(
        folder.glob("*.csv"), key=lambda path: [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.stem.split("-")]
    )
    if not files:
        raise BadTrace(f"{folder} has no CSV of a ServeGen client")
    clients = [_client(path) for path in files]
    width = float(clients[0][1, 0] - clients[0][0, 0])
    seconds = max(float(client[-1, 0]) for client in clients) + width
    found = []
    for index in range(models):
        client = clients[index % len(clients)]
        times = _thinned(client[rng.random(len(client)) < windows], width, requests, most_a_second, rng)
        found.append((times + rng.uniform(0, seconds)) % seconds)
    return _joined([f"model-{index}" for index in range(models)], found, tokens, seconds)


def daily(
    models: int, days: float, visits_a_day: float, spread_seconds: float, noise: float, tokens: float, rng: np.random.Generator
) -> Trace:
    """Each model has an hour of its own, and is asked for around it: so many visits a day, spread normally; `noise`: the share of visits
    that come at any time.
    """
    seconds = days * _DAY
    found = []
    for _ in range(models):
        hour = rng.uniform(0, _DAY)
        count = rng.poisson(visits_a_day * days)
        times = rng.integers(0, math.ceil(days), count) * _DAY + hour + rng.normal(0, spread_seconds, count)
        anywhere = rng.random(count) < noise
        times[anywhere] = rng.uniform(0, seconds, int(anywhere.sum()))
        found.append(times[(times >= 0) & (times < seconds)])
    return _joined([f"model-{index}" for index in range(models)], found, tokens, seconds)


def _joined(names: list[str], found: list[Floats], tokens: float, seconds: float) -> Trace:
    at = np.concatenate(found)
    if not len(at):
        raise BadTrace("the trace has no requests: more models, more days or more requests a day make some")
    model = np.repeat(np.arange(len(found)), [len(each) for each in found])
    order = np.argsort(at, kind="stable")
    return Trace(names, at[order], model[order], np.full(len(at), tokens), seconds)


def _client(path: Path) -> Floats:
    """Of each window: its start, requests a second, and the variation of their gaps."""
    rows: list[tuple[float, float, float]] = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            where, fields = f"{path}, line {number}", line.split(",")
            if len(fields) != 6:
                raise BadTrace(f"{where}: it has {len(fields)} fields, not the six of a ServeGen window")
            start, rate = _number(fields[0], "the window's start", where), _number(fields[1] or "0", "the rate", where)
            if rows and start <= rows[-1][0]:
                raise BadTrace(f"{where}: the window starts at {start:g} s, no later than the one before")
            rows.append((start, rate, _number(fields[2] or "1", "the variation of the gaps", where) or 1.0))
    except OSError as error:
        raise BadTrace(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadTrace(f"{path} is no text in UTF-8") from None
    if len(rows) < 2:
        raise BadTrace(f"{path} has {len(rows)} windows: two are the least by which their length is known")
    return np.array(rows)


def _thinned(windows: Floats, width: float, requests: float, most_a_second: float, rng: np.random.Generator) -> Floats:
    """When there are requests in these windows, of so many seconds each."""
    busy = windows[windows[:, 1] > 0]
    share = np.minimum(requests, most_a_second / busy[:, 1])
    kept = rng.binomial(np.maximum(np.round(busy[:, 1] * width), 1).astype(np.int64), share)
    busy, share, kept = busy[kept > 0], share[kept > 0], kept[kept > 0]
    if not len(kept):
        return np.empty(0)
    gaps = kept + 1  # one more, to the window's end
    variance = np.repeat(np.clip(busy[:, 2], 0.05, None) ** 2, gaps)  # over the squared mean
    drawn = np.maximum(rng.gamma(rng.geometric(np.repeat(share, gaps)) / variance) * variance, 1e-9)
    ends, total = np.cumsum(gaps), np.cumsum(drawn)
    before = np.concatenate(([0.0], total[ends[:-1] - 1]))
    whole = total[ends - 1] - before
    inside = (total - np.repeat(before, gaps)) / np.repeat(whole, gaps) * width + np.repeat(busy[:, 0], gaps)
    return np.asarray(np.delete(inside, ends - 1), dtype=np.float64)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str, what: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise BadTrace(f"{where}: {what} is {text.strip()!r}, which is no number") from None
    if not math.isfinite(value) or value < 0:
        raise BadTrace(f"{where}: {what} is {text.strip()}: it must be 0 or more, and finite")
    return value
