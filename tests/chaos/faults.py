"""What can be done to the stack, and the draw of a run from its seed.

A fault is a value: number N of seed S is the same on every machine and in every run, so a run that was ended goes on at the number that its
journal says, and what one fault showed can be tried again by its number alone.
"""

from __future__ import annotations

import functools
import random
from dataclasses import asdict, dataclass
from typing import Any

from tests.chaos.moments import STRIKES
from tests.chaos.wires import WIRES

VICTIMS = tuple(dict.fromkeys(victim for victim, _ in STRIKES))
WEIGHTS = {
    "kill": 25,
    "stop": 25,
    "disk full": 5,
    "disk slow": 5,
    "chunk flipped": 4,
    "chunk torn": 4,
    "chunk removed": 2,
    "manifest flipped": 2,
    "manifest torn": 2,
    "wire cut": 6,
    "wire slow": 6,
    "wire silent": 6,
    "wire refuses": 4,
    "wire half-open": 3,
    "descriptors": 5,
    "pids": 4,
    "memory": 4,
    "memory short": 4,
    "clock": 4,
    "keda storm": 3,
    "keda half-open": 3,
    "keda garbage": 3,
    "gateway garbage": 3,
    "clients leave": 4,
    "slow heads": 3,
}
_MACHINES = ("one", "two")


@dataclass(frozen=True)
class Fault:
    """One of them. seconds: how long it lasts, where it does; chance: what is left to chance in it, such as which file."""

    number: int
    kind: str
    machine: str
    victim: str = ""
    moment: str = "at once"
    seconds: float = 0.0
    chance: int = 0
    pause: float = 0.0  # seconds before it

    @property
    def name(self) -> str:
        return f"{self.kind} {self.victim}".strip()

    def written(self) -> dict[str, Any]:
        return asdict(self)


def draw(seed: int, number: int, kinds: dict[str, int] | None = None) -> Fault:
    """Fault `number` of a seed, of these kinds and weights."""
    weights = WEIGHTS if kinds is None else kinds
    chance = random.Random(f"{seed}/{number}")
    kind = _kind(seed, number, tuple(weights.items()))
    machine = chance.choice(_MACHINES)
    victim, moment = "", "at once"
    if kind in ("kill", "stop"):
        victim, moment = _strike(seed, kind, sum(_kind(seed, each, tuple(weights.items())) == kind for each in range(number)))
    elif kind in ("descriptors", "memory"):
        victim = chance.choice(("scaler", "agent", "gpumem"))
    elif kind == "clock":
        victim = chance.choice(("scaler", "agent"))
    elif kind == "wire half-open":
        victim = "engine"  # both ends of the others are told when it is mended
    elif kind.startswith("wire"):
        victim = chance.choice(WIRES)
    return Fault(
        number,
        kind,
        machine,
        victim,
        moment,
        seconds=round(chance.choice((0.05, 0.3, 1.0, 2.5)) * chance.uniform(0.7, 1.3), 3),
        chance=chance.getrandbits(32),
        pause=round(chance.uniform(0.1, 0.7), 3),
    )


@functools.cache
def _kind(seed: int, number: int, weights: tuple[tuple[str, int], ...]) -> str:
    kinds, weighs = zip(*weights, strict=True)
    return str(random.Random(f"{seed}/{number}/kind").choices(kinds, weighs)[0])


def _strike(seed: int, kind: str, turn: int) -> tuple[str, str]:
    """Whom, and when. They come by turns, so that a run leaves none of them out to chance."""
    times, turn = divmod(turn, len(STRIKES))
    return random.Random(f"{seed}/{kind}/{times}").sample(STRIKES, len(STRIKES))[turn]
