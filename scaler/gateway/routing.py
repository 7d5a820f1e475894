"""What a request asks for: its model, and how it wants to be held. Pure functions over a request's head and body.

The model can stand in three places; the first that names a known model decides: the JSON body's `model` (OpenAI's way), the header
`X-Zerowake-Model`, the path `/models/<name>/...` (the prefix is not passed on). The body is only a source when it is JSON, uncompressed,
and its length is known to be within the bound, or when nothing else names a model; everything else streams through unread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec

from scaler.books.demand import DemandReader, UnknownModel
from scaler.books.fairness import Priority
from scaler.gateway.refusal import Refusal

MODEL = "X-Zerowake-Model"
TENANT = "X-Zerowake-Tenant"
PRIORITY = "X-Zerowake-Priority"
HEARTBEAT = "X-Zerowake-Heartbeat"

_PREFIX = "/models/"
_PRIORITIES = {priority.name.lower(): priority for priority in Priority}
_HEARTBEAT_SECONDS = (0.1, 300.0)


@dataclass(frozen=True, slots=True)
class Target:
    """A request's target. path: as the engine gets it, query included, percent-encoding untouched; model: named by the path, or empty."""

    path: str
    model: str = ""


class Route(NamedTuple):
    """Where a request goes. model: whose replicas may answer it; stream: an event stream is asked for."""

    model: str
    stream: bool


class Asked(msgspec.Struct):
    """The two members of an OpenAI body that matter here. Whatever else is in it is skipped, not built."""

    model: object = None
    stream: object = None


_decode = msgspec.json.Decoder(Asked).decode


def target(raw: str) -> Target:
    """Splits `/models/<name>` off a request's raw target. Raises: Refusal if it is not a path."""
    if not raw.startswith("/"):
        split = urlsplit(raw)
        if split.scheme not in {"http", "https"}:
            raise Refusal(400, "bad_target", f"the request's target {raw!r} is not a path")
        raw = (split.path or "/") + (f"?{split.query}" if split.query else "")
    if not raw.startswith(_PREFIX):
        return Target(raw)
    path, mark, query = raw.partition("?")
    name, _, rest = path[len(_PREFIX) :].partition("/")
    if not name:
        raise Refusal(404, "model_not_found", f"the path {path!r} names no model: it is {_PREFIX}<name>/...", param="model")
    return Target(f"/{rest}{mark}{query}", unquote(name))


def route(headers: Mapping[str, str], target: Target, body: bytes | None, demand: DemandReader) -> Route:
    """body: None: there is none, or it was not read. Raises: Refusal if no model is named, or none of those named is known."""
    named: list[tuple[str, object]] = [(f"header {MODEL}", headers.get(MODEL, "")), ("path", target.model)]
    found = asked(body) if body is not None else None
    if found is not None:
        named.insert(0, ("body", found.model))
    return Route(choose(named, demand), found is not None and found.stream is True)


def body_first(headers: Mapping[str, str], length: int | None, bound: int, named: bool) -> bool:
    """Whether the body is read for its `model` before anything is passed on.

    length: the body's bytes if they are known; bound: how many are read; named: header or path name a model already.
    """
    if not named:
        return True
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    plain = headers.get("Content-Encoding", "identity").lower() == "identity"
    return length is not None and length <= bound and plain and (kind == "application/json" or kind.endswith("+json"))


def asked(body: bytes) -> Asked | None:
    """What a JSON body asks for; None if it is no JSON object."""
    try:
        return _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def choose(sources: Collection[tuple[str, object]], demand: DemandReader) -> str:
    """The model of a request, out of what each source (most important first) names. Raises: Refusal."""
    named = [(source, name) for source, name in sources if name not in (None, "")]
    for source, name in named:
        if not isinstance(name, str):
            raise Refusal(400, "bad_model", f"`model` in the {source} must be a string, not {type(name).__name__}", param="model")
        if demand.knows(name):
            return name
    if named:
        raise Refusal(404, "model_not_found", str(UnknownModel(str(named[0][1]), demand.models())), param="model")
    message = f"the request names no model: name it as `model` in a JSON body, in the header {MODEL}, or in the path {_PREFIX}<name>/..."
    raise Refusal(400, "model_missing", message, param="model")


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
