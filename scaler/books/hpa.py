"""The rules by which KEDA and the Horizontal Pod Autoscaler choose a number of replicas, without any input or output.

KEDA decides between nothing and something (`activation`): at a `true` and at every poll. Above zero the HPA decides how many (`Hpa`): the
metric's sum over the target of one replica (AverageValue), left alone within 10 %, then stabilised (down: the highest recommendation of
the window; up: none), then limited (up: by 4 replicas or 100 % in 15 s, whichever allows more; down: not limited), then bounded.
The order and the rounding are those of Kubernetes, whose numbers are thousandths, so integers are used where it uses integers.
Rejected: the HPA's other metric types and policies, since ours is one metric with the defaults.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

SYNC_SECONDS = 15.0
POLICY_SECONDS = 15.0
POLICY_PODS = 4
POLICY_FACTOR = 2
TOLERANCE_PERCENT = 10


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """What a ScaledObject says beside its triggers. Counts are replicas, the rest seconds; the defaults are KEDA's, except for one replica
    at most, since one machine rarely holds KEDA's 100.

    Raises:
        ValueError: a field's value is impossible; the message begins with its name.
    """

    min_replicas: int = 0
    max_replicas: int = 1
    idle_replicas: int | None = None
    cooldown_seconds: float = 300.0
    polling_seconds: float = 30.0
    stabilisation_seconds: float = 300.0

    def __post_init__(self) -> None:
        if self.min_replicas < 0:
            raise ValueError(f"min_replicas is {self.min_replicas}: it must be 0 or more")
        if self.max_replicas < max(1, self.min_replicas):
            raise ValueError(f"max_replicas is {self.max_replicas}: it must be at least 1 and at least min_replicas ({self.min_replicas})")
        if self.idle_replicas is not None and (self.idle_replicas != 0 or self.min_replicas < 1):
            # Above zero the HPA would lift the idle replicas to min_replicas again, so KEDA documents 0 as the only value.
            raise ValueError(f"idle_replicas is {self.idle_replicas}: it must be 0, with min_replicas at 1 or more, or be left out")
        if self.cooldown_seconds < 0:
            raise ValueError(f"cooldown_seconds is {self.cooldown_seconds}: it must be 0 or more")
        if self.polling_seconds <= 0:
            raise ValueError(f"polling_seconds is {self.polling_seconds}: it must be more than 0")
        if self.stabilisation_seconds < 0:
            raise ValueError(f"stabilisation_seconds is {self.stabilisation_seconds}: it must be 0 or more")

    @property
    def first_replicas(self) -> int:
        """What an activation asks for, and the least that the HPA leaves."""
        return max(self.min_replicas, 1)


def activation(rules: ScalingRules, *, active: bool, failed: bool, replicas: int, idle_seconds: float) -> int | None:
    """KEDA's wish for `replicas` now, or None to leave them.

    `failed`: the scaler could not be asked, so nothing is known and nothing is taken away. `idle_seconds`: since it was last active.
    """
    if active:
        return rules.first_replicas if replicas == 0 or (rules.idle_replicas is not None and replicas < rules.min_replicas) else None
    if failed:
        return None
    if rules.idle_replicas is not None or rules.min_replicas == 0:
        return 0 if replicas > 0 and idle_seconds > rules.cooldown_seconds else None
    return rules.min_replicas if replicas < rules.min_replicas else None


def proportional(current: int, total: float, target: float) -> int:
    """The replicas of which each would have at most `target` of `total`; `current` while they are within the tolerance."""
    total_milli, target_milli = round(total * 1000), round(target * 1000)
    share = 100 * total_milli
    if (100 - TOLERANCE_PERCENT) * target_milli * current <= share <= (100 + TOLERANCE_PERCENT) * target_milli * current:
        return current
    return -(-total_milli // target_milli)


def rise_limit(current: int, added: int, removed: int) -> int:
    """The most replicas that the default scale-up policies allow, when `added` and `removed` of `current` changed within the period."""
    before = current - added + removed
    return max(current, before + POLICY_PODS, before * POLICY_FACTOR)


class Hpa:
    """One autoscaler's memory: recommendations for the stabilisation window, changes for the rate limit. `now` is any clock's seconds."""

    def __init__(self, rules: ScalingRules) -> None:
        self._rules = rules
        self._recommendations: deque[tuple[float, int]] = deque()
        self._changes: deque[tuple[float, int]] = deque()

    def desired(self, *, current: int, total: float, target: float, now: float, limited: bool = True) -> int:
        """The replicas to have now. `limited=False` leaves the scale-up policies out (scaler/local/autoscaler.py: when that is right)."""
        if current == 0:
            return 0  # at zero the HPA is switched off: only an activation leads away from it
        rules = self._rules
        if current > rules.max_replicas:
            return rules.max_replicas
        if current < rules.first_replicas:
            return rules.first_replicas
        wanted = self._stabilised(current, proportional(current, total, target), now)
        if wanted > current and limited:
            wanted = min(wanted, self._rise_limit(current, now))
        return min(max(wanted, rules.first_replicas), rules.max_replicas)

    def changed(self, before: int, after: int, now: float) -> None:
        """To be called when a wish of this autoscaler was carried out: it counts against the rate limit."""
        self._changes.append((now, after - before))

    def _stabilised(self, current: int, wanted: int, now: float) -> int:
        past = self._recommendations
        while past and past[0][0] < now - self._rules.stabilisation_seconds:
            past.popleft()
        if not past:
            past.append((now, current))
        floor = max(wanted, *(replicas for _, replicas in past)) if self._rules.stabilisation_seconds else wanted
        past.append((now, wanted))
        return wanted if wanted >= current else min(current, floor)

    def _rise_limit(self, current: int, now: float) -> int:
        changes = self._changes
        while changes and changes[0][0] < now - POLICY_SECONDS:
            changes.popleft()
        added = sum(change for _, change in changes if change > 0)
        removed = -sum(change for _, change in changes if change < 0)
        return rise_limit(current, added, removed)
