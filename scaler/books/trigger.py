"""The metadata of a ScaledObject's trigger: what a user may write there and what it means.

KEDA forwards every key of the trigger's metadata, its own included, so those are let through unread. A key that ends in `FromEnv` keeps
its name and arrives with the variable's value, or not at all when the variable is empty. Values of a TriggerAuthentication never arrive.
Everything else is refused by name: a mistyped key that is silently ignored would scale a model by rules its owner never wrote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from scaler.books.model_name import LONGEST, flaw

OWN_KEYS = ("model", "targetPending", "maxStageSeconds")
# What KEDA reads itself, now or in versions before 2.21 (metricName, metricType, tlsCertFile).
KEDA_KEYS = frozenset(
    {"scalerAddress", "enableTLS", "unsafeSsl", "caCert", "tlsClientCert", "tlsClientKey", "tlsCertFile", "metricName", "metricType"}
)
FROM_ENV = "FromEnv"
DEFAULT_TARGET = 8.0
# The Horizontal Pod Autoscaler counts in thousandths: anything smaller would reach it as a target of zero.
SMALLEST_TARGET = 0.001


class BadTrigger(ValueError):
    """A trigger's metadata cannot be used; the message names the key and says what is allowed."""


@dataclass(frozen=True, slots=True)
class Trigger:
    """One zerowake trigger.

    `target_pending`: requests, held and in flight, that one replica should have. `max_stage_seconds`: the longest staging that the
    planner may choose a node for; None: any.
    """

    model: str
    target_pending: float = DEFAULT_TARGET
    max_stage_seconds: float | None = None


def parse_trigger(metadata: Mapping[str, str]) -> Trigger:
    """The trigger that `metadata` describes.

    Raises:
        BadTrigger: a key is unknown, missing, given twice, or its value is of no use.
    """
    own: dict[str, str] = {}
    for key, value in metadata.items():
        name = key.removesuffix(FROM_ENV)
        if name in KEDA_KEYS:
            continue
        if name not in OWN_KEYS:
            raise BadTrigger(_unknown(key))
        if name in own:
            raise BadTrigger(f"{name} and {name}{FROM_ENV} are both in the trigger's metadata: leave one of them out")
        own[name] = value
    model = own.get("model", "")
    if not model.strip():
        raise BadTrigger(
            "model is missing in the trigger's metadata: give the name of the model, as requests name it"
            f" (or model{FROM_ENV}, an environment variable of the workload's container that is set and not empty)"
        )
    if why := flaw(model):
        raise BadTrigger(f"model: {model[:LONGEST]!r} in the trigger's metadata is no name of a model: {why}")
    stage = _number("maxStageSeconds", own, 0)
    return Trigger(model, _number("targetPending", own, SMALLEST_TARGET) or DEFAULT_TARGET, stage)


def _number(key: str, own: Mapping[str, str], least: float) -> float | None:
    if key not in own:
        return None
    text = own[key]
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= least):
        raise BadTrigger(f"{key}: {text!r} in the trigger's metadata is not a number of {least:g} or more")
    return number


def _unknown(key: str) -> str:
    allowed = ", ".join(OWN_KEYS)
    near = get_close_matches(key.removesuffix(FROM_ENV), OWN_KEYS, n=1, cutoff=0.6)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return (
        f"unknown key {key!r} in the trigger's metadata{hint}; allowed: {allowed}, each also with {FROM_ENV},"
        f" and KEDA's own ({', '.join(sorted(KEDA_KEYS))})"
    )
