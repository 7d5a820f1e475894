"""Which model a request goes to. Pure functions over its target, head and body.

The model can stand in three places; the first that names a known model decides: the JSON body's `model` (OpenAI's way), the header
`X-Zerowake-Model`, the path `/models/<name>/...` (the prefix is not passed on). The body is only a source when it is JSON, uncompressed,
and its length is known to be within the bound, or when nothing else names a model; everything else streams through unread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import msgspec

from scaler.books.demand import DemandReader, UnknownModel
from scaler.gateway.headers import MODEL
from scaler.gateway.refusal import Refusal
from scaler.gateway.target import PREFIX, Target


class Route(NamedTuple):
    """Where a request goes. model: whose replicas may answer it; stream: an event stream is asked for."""

    model: str
    stream: bool


class Asked(msgspec.Struct):
    """The two members of an OpenAI body that matter here. Whatever else is in it is skipped, not built."""

    model: object = None
    stream: object = None


_decode = msgspec.json.Decoder(Asked).decode


def route(headers: Mapping[str, str], target: Target, body: bytes | None, demand: DemandReader) -> Route:
    """body: None: there is none, or it was not read. Raises: Refusal if no model is named, or none of those named is known."""
    named: list[tuple[str, object]] = [(f"header {MODEL}", headers.get(MODEL, "")), ("path", target.model)]
    found = asked(body) if body is not None else None
    if found is not None:
        named.insert(0, ("body", found.model))
    return Route(choose(named, demand), found is not None and found.stream is True)


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
    message = f"the request names no model: name it as `model` in a JSON body, in the header {MODEL}, or in the path {PREFIX}<name>/..."
    raise Refusal(400, "model_missing", message, param="model")
