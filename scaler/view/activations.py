"""What an ended activation leaves behind: a log line, and one observation a phase. Alerts and dashboards build on the names."""

from __future__ import annotations

import logging

from prometheus_client import Counter, Histogram

from scaler.books.activation import Activation
from scaler.gateway.metrics import WAITS

log = logging.getLogger(__name__)

ACTIVATIONS = Counter("zerowake_activations_total", "Scale-ups from zero, by outcome (served, abandoned).", ["model", "outcome"])
ACTIVATION_SECONDS = Histogram(
    "zerowake_activation_seconds",
    "Scale-ups from zero, first byte in to first byte out, by how their replica was made (restored, standby, parked, cold, captured, or "
    "unknown where no agent said it).",
    ["model", "origin"],
    buckets=WAITS,
)
ACTIVATION_PHASE_SECONDS = Histogram(
    "zerowake_activation_phase_seconds", "What scale-ups from zero spent their time on.", ["model", "phase"], buckets=WAITS
)


def record_activation(activation: Activation) -> None:
    """Logs and counts an activation that has ended. How long those took that nobody was served by is not observed."""
    ACTIVATIONS.labels(activation.model, activation.outcome).inc()
    if activation.outcome == "served":
        ACTIVATION_SECONDS.labels(activation.model, activation.origin or "unknown").observe(
            activation.total, exemplar={"activation": activation.id}
        )
        for phase, seconds in activation.phases.items():
            ACTIVATION_PHASE_SECONDS.labels(activation.model, phase).observe(seconds)
    log.info(
        "activation",
        extra={
            "fields": {
                "activation": activation.id,
                "model": activation.model,
                "outcome": activation.outcome,
                "reason": activation.reason,
                "origin": activation.origin,
                **({"trace": activation.trace.trace_id} if activation.trace else {}),
                "seconds": round(activation.total, 6),
                "phases": {phase: round(seconds, 6) for phase, seconds in activation.phases.items()},
            }
        },
    )
