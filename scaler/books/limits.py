"""How much of a model's demand is held, and how much one replica works on."""

from __future__ import annotations

from dataclasses import dataclass, fields

MIB = 2**20


TOTAL_REQUESTS = 40_000
TOTAL_BYTES = 1024 * MIB


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the gateway holds for one model.

    max_requests: requests held at once; max_bytes: bytes of their bodies; max_wait_seconds: how long one is held before it is refused;
    concurrency: requests that one replica works on at once.

    Raises: ValueError naming a field that is not above 0.
    """

    max_requests: int = 10_000
    max_bytes: int = 256 * MIB
    max_wait_seconds: float = 300.0
    concurrency: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value <= 0:
                raise ValueError(f"{field.name} must be greater than 0, not {value!r}")
