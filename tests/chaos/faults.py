"""What can be done to the stack, and the draw of a run from its seed.

A fault is a value: number N of seed S is the same on every machine and in every run, so a run that was ended goes on at the number that its
journal says, and what one fault showed can be tried again by its number alone.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

VICTIMS = ("scaler", "agent", "engine", "sandbox", "criu", "gpumem", "filler", "s3")
# When it is done: at once, or as soon as what is named is seen from outside, by the names of phases (zerowake_shared/phases.py).
MOMENTS = ("at once", "held", "image.sandbox", "image.criu", "image.fill", "health", "first_byte")
CAPTURE = ("start", "ready", "request", "quiesce", "dump", "split", "prove", "publish")
# A process that comes and goes is hit where it is.
_OF = {
    "engine": ("at once", "image.fill", "health", "first_byte"),
    "criu": ("image.criu", "image.fill"),
    "sandbox": ("image.sandbox", "health", "first_byte"),
    "gpumem": ("at once", "image.criu"),
    "filler": ("at once", "image.criu"),
    "s3": ("at once",),
}
WEIGHTS = {
    "kill": 30,
    "stop": 20,
    "disk full": 5,
    "chunk flipped": 4,
    "chunk torn": 4,
    "chunk removed": 2,
    "manifest flipped": 2,
    "manifest torn": 2,
    "wire cut": 3,
    "wire slow": 3,
    "wire silent": 3,
    "wire refuses": 2,
    "descriptors": 5,
    "pids": 4,
    "memory": 4,
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
    kind = chance.choices(list(weights), list(weights.values()))[0]
    machine = chance.choice(_MACHINES)
    victim, moment = "", "at once"
    if kind in ("kill", "stop"):
        victim = chance.choice(VICTIMS)
        moment = chance.choice(_OF.get(victim, MOMENTS))
        if victim in ("scaler", "agent", "engine", "sandbox", "criu", "s3") and chance.random() < 0.35:
            moment = chance.choice(CAPTURE)
    elif kind in ("descriptors", "memory"):
        victim = chance.choice(("scaler", "agent", "gpumem"))
    elif kind == "clock":
        victim = chance.choice(("scaler", "agent"))
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
