"""The gateway's own request headers: how a request wants to be held, and whose turn it takes. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from scaler.books.fairness import Priority
from scaler.gateway.refusal import Refusal

MODEL = "X-Zerowake-Model"
TENANT = "X-Zerowake-Tenant"
PRIORITY = "X-Zerowake-Priority"
HEARTBEAT = "X-Zerowake-Heartbeat"

_PRIORITIES = {priority.name.lower(): priority for priority in Priority}
_HEARTBEAT_SECONDS = (0.1, 300.0)


def priority(headers: Mapping[str, str]) -> Priority:
    """Raises: Refusal naming the header."""
    value = headers.get(PRIORITY)
    if value is None:
        return Priority.NORMAL
    found = _PRIORITIES.get(value.strip().lower())
    if found is None:
        raise Refusal(400, "bad_priority", f"{PRIORITY} must be one of {', '.join(_PRIORITIES)}, not {value!r}", param=PRIORITY)
    return found


def heartbeat(headers: Mapping[str, str]) -> float | None:
    """Seconds between comments to a client that waits for a stream; None: it did not ask for them. Raises: Refusal naming the header."""
    value = headers.get(HEARTBEAT)
    if value is None:
        return None
    least, most = _HEARTBEAT_SECONDS
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not least <= seconds <= most:
        message = f"{HEARTBEAT} must be a number of seconds from {least:g} to {most:g}, not {value!r}"
        raise Refusal(400, "bad_heartbeat", message, param=HEARTBEAT)
    return seconds


def tenant(headers: Mapping[str, str]) -> str:
    """Whose turn a request takes. Keys of different kinds cannot meet; a secret is kept as its hash only."""
    named = headers.get(TENANT)
    if named:
        return f"tenant:{named}"
    secret = headers.get("Authorization")
    if secret:
        return "key:" + hashlib.blake2b(secret.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    return "anonymous"
