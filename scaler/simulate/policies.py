"""What is kept when memory is short, and fetched ahead of need: the product's policy, and those it is compared with.

A policy gives each model a number, by which models that are idle stay in memory and others leave; higher stays. Where numbers are worth a
byte (`by_bytes`) they are added up, so that a large model has to be worth as much as all the small ones that leave for it. A policy that
fetches ahead gives wishes, too: the models that it would have in memory and that are not.

| name | number | from |
| --- | --- | --- |
| cold | nothing is kept | |
| keep-alive | last use, for ten minutes | most serverless platforms |
| lru | last use | |
| lru-blind | last use, and pods are placed without looking at where bytes stand | |
| greedy-dual | inflation + uses × seconds ÷ bytes | FaasCache (ASPLOS'21) |
| histogram | last use, from the 5th to the 99th percentile of its own idle times, fetched ahead of the 5th | Serverless in the Wild |
| serverlessllm | last use, in host memory alone, running models' bytes too; the node that serves soonest | ServerlessLLM (OSDI'24) |
| zerowake | scaler/plan/worth.py by scaler/forecast | the product |
| belady | the next use, which it knows, ÷ bytes | |
| clairvoyant | the next use, which it knows, and fetches ahead of it | |

`always-on` is no policy of memory: all models run all the time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scaler.forecast.forecast import Forecast
from scaler.plan.worth import SWAP, Floats, Objective, worth

_NEVER = -1e18
_SOON = 1.0  # seconds: uses that are nearer than this are as near as can be
_RECKONED_ANEW_SECONDS = 30.0  # hazards change by the logarithm of the idle time
_JUDGED_SECONDS = 60.0


class Policy:
    """What all have: it hears of each beginning and end of an episode, in order. sizes: bytes; saved: seconds that memory saves."""

    name = "cold"
    keeps = True
    by_bytes = False
    looks_where_bytes_are = True
    keeps_running = False  # host memory has the bytes of running models, too
    on_gpus = True  # idle weights may stay on GPUs
    margin = 1.0
    looks_at = 8  # wishes, at each look

    def __init__(self, sizes: Floats, saved: Floats) -> None:
        self.sizes, self.saved = sizes, saved
        self.numbers = np.full(len(sizes), _NEVER)

    def began(self, model: int, at: float) -> None:
        """An episode of the model begins."""

    def quiet(self, model: int, at: float) -> None:
        """Its last request has ended; its replica is there for the cooldown."""

    def ended(self, model: int, at: float, following: float) -> None:
        """Its replica has gone. following: when it will be asked for again, which only those that look ahead may use."""

    def left(self, model: int) -> None:
        """Its bytes have left memory."""

    def worth_of(self, at: float) -> Sequence[float]:
        """Of each model, now."""
        found: Sequence[float] = self.numbers  # type: ignore[assignment]
        return found

    def is_kept(self, model: int, at: float) -> bool:
        """Whether the bytes may be there still; else they are gone, whether or not somebody wanted the room."""
        return self.keeps

    def wishes(self, at: float) -> Sequence[int]:
        """Models to be fetched ahead, the first first. Those that stand in memory, or run, may be among them."""
        return ()


class Cold(Policy):
    keeps = False


class Lru(Policy):
    name = "lru"

    def ended(self, model: int, at: float, following: float) -> None:
        self.numbers[model] = at


class KeepAlive(Lru):
    name = "keep-alive"
    seconds = 600.0

    def is_kept(self, model: int, at: float) -> bool:
        return bool(at - self.numbers[model] <= self.seconds)


class LruBlind(Lru):
    name = "lru-blind"
    looks_where_bytes_are = False


class ServerlessLlm(Lru):
    name = "serverlessllm"
    keeps_running = True
    on_gpus = False

    def began(self, model: int, at: float) -> None:
        self.numbers[model] = at


class GreedyDual(Policy):
    name = "greedy-dual"

    def __init__(self, sizes: Floats, saved: Floats) -> None:
        super().__init__(sizes, saved)
        self._inflation = 0.0
        self._uses = np.zeros(len(sizes))

    def ended(self, model: int, at: float, following: float) -> None:
        self._uses[model] += 1
        self.numbers[model] = self._inflation + self._uses[model] * self.saved[model] / self.sizes[model]

    def left(self, model: int) -> None:
        self._inflation = max(self._inflation, float(self.numbers[model]))
        self._uses[model] = 0


class Histogram(Lru):
    """Idle times in minutes, up to four hours. A model with few of them, or most beyond four hours, is kept as long as there is room."""

    name = "histogram"
    _minutes = 240
    _least = 10

    def __init__(self, sizes: Floats, saved: Floats) -> None:
        super().__init__(sizes, saved)
        self._counts = np.zeros((len(sizes), self._minutes + 1))
        self._ended = np.full(len(sizes), np.nan)
        self._from = np.zeros(len(sizes))
        self._to = np.full(len(sizes), np.inf)

    def began(self, model: int, at: float) -> None:
        if np.isnan(self._ended[model]):
            return
        idle = (at - self._ended[model]) / 60
        counts = self._counts[model]
        counts[min(int(idle), self._minutes)] += 1
        total = counts.sum()
        if total >= self._least and counts[-1] < total / 2:
            so_far = np.cumsum(counts[:-1]) / counts[:-1].sum()
            self._from[model] = 60 * int(np.searchsorted(so_far, 0.05))
            self._to[model] = 60 * (int(np.searchsorted(so_far, 0.99)) + 1)
        self._ended[model] = np.nan

    def ended(self, model: int, at: float, following: float) -> None:
        super().ended(model, at, following)
        self._ended[model] = at

    def worth_of(self, at: float) -> Sequence[float]:
        idle = at - self._ended
        outside = (idle > self._to) | (idle < self._from - 60)
        found: Sequence[float] = np.where(outside, self.numbers - 1e9, self.numbers)  # type: ignore[assignment]
        return found

    def wishes(self, at: float) -> Sequence[int]:
        idle = at - self._ended
        due = np.flatnonzero((self._from > 60) & (idle >= self._from - 60) & (idle <= self._from + 60))
        return [int(model) for model in due]


class Belady(Policy):
    name = "belady"
    by_bytes = True

    def __init__(self, sizes: Floats, saved: Floats) -> None:
        super().__init__(sizes, saved)
        self._next = np.full(len(sizes), np.inf)

    def ended(self, model: int, at: float, following: float) -> None:
        self._next[model] = following

    def worth_of(self, at: float) -> Sequence[float]:
        found: Sequence[float] = 1 / (np.maximum(self._next - at, _SOON) * self.sizes)  # type: ignore[assignment]
        return found


class Clairvoyant(Belady):
    """By the next use alone: who is asked for first is there first."""

    name = "clairvoyant"
    by_bytes = False
    ahead = 1800.0

    def __init__(self, sizes: Floats, saved: Floats, first: Floats) -> None:
        super().__init__(sizes, saved)
        self._next = first.copy()

    def worth_of(self, at: float) -> Sequence[float]:
        found: Sequence[float] = 1 / np.maximum(self._next - at, _SOON)  # type: ignore[assignment]
        return found

    def began(self, model: int, at: float) -> None:
        self._next[model] = np.inf

    def wishes(self, at: float) -> Sequence[int]:
        soon = np.flatnonzero(self._next < at + self.ahead)
        found: list[int] = soon[np.argsort(self._next[soon], kind="stable")].tolist()
        return found


class Zerowake(Policy):
    """The product's: worth.py by the forecast, and prefetch where there is room, or what is there is worth 1.3 times less."""

    name = "zerowake"
    by_bytes = True
    margin = SWAP

    def __init__(self, names: Sequence[str], sizes: Floats, saved: Floats, forecast: Forecast, start: float, objective: Objective) -> None:
        super().__init__(sizes, saved)
        self._names, self._forecast, self._start, self._objective = names, forecast, start, objective
        self._index = {name: index for index, name in enumerate(names)}
        self._order: list[str] = []
        self._to = np.arange(0)
        self._reckoned = self._judged = -np.inf
        for name in names:
            forecast.declare(name, start)

    def began(self, model: int, at: float) -> None:
        self._forecast.began(self._names[model], self._start + at)

    def quiet(self, model: int, at: float) -> None:
        self._forecast.ended(self._names[model], self._start + at)

    def worth_of(self, at: float) -> Sequence[float]:
        if at - self._judged >= _JUDGED_SECONDS:
            self._forecast.judge(self._start + at)
            self._judged = at
        if at - self._reckoned >= _RECKONED_ANEW_SECONDS:
            names, hazards = self._forecast.hazards(self._start + at)
            if names is not self._order and names != self._order:
                self._order, self._to = names, np.array([self._index[name] for name in names])
            chance = np.zeros(len(self.sizes))
            chance[self._to] = hazards
            self.numbers = worth(chance, self.saved, self.sizes, self._objective)
            self._listed: list[float] = self.numbers.tolist()  # of which one number is had sooner
            self._wishes: list[int] = np.argsort(-self.numbers, kind="stable").tolist()
            self._reckoned = at
        return self._listed

    def wishes(self, at: float) -> Sequence[int]:
        self.worth_of(at)
        return self._wishes
