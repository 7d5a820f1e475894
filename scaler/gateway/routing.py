"""Which model a request goes to. Pure functions over its target, its head, and what its body asks for.

A model can be named in four places; the first that names a known one decides: the body's `model` (OpenAI's way; a member of JSON or a field
of a form), the header `X-Zerowake-Model`, the path `/models/<name>/...` (the prefix is not passed on), the query's `model` (as OpenAI's
realtime API has it). A name may be one of those that a model's server answers to besides, a LoRA's for instance.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple
from urllib.parse import parse_qsl

from scaler.books.demand import DemandReader, UnknownModel
from scaler.books.model_name import flaw
from scaler.gateway import asked
from scaler.gateway.headers import MODEL
from scaler.gateway.refusal import Refusal
from scaler.gateway.target import PREFIX, Target
from scaler.gateway.upload import Upload


class Route(NamedTuple):
    """Where a request goes. model: whose replicas may answer it; stream: an event stream is asked for."""

    model: str
    stream: bool


def outside(headers: Mapping[str, str], target: Target) -> list[str]:
    """The names that stand outside the body, the most important first."""
    names = [headers.get(MODEL, ""), target.model]
    if "model=" in target.path:
        names += [value for name, value in parse_qsl(target.path.partition("?")[2]) if name == "model"][-1:]
    return [name for name in names if name]


def known(names: Collection[str], demand: DemandReader) -> str:
    """The first of the models named that is known; empty: none is."""
    for name in names:
        if model := demand.named(name):
            return model
    return ""


def route(method: str, headers: Mapping[str, str], target: Target, upload: Upload, demand: DemandReader) -> Route:
    """Raises: Refusal if no model is named, or none of those named is known."""
    body = upload.asked
    if body is not None and (model := demand.named(body.model)):
        return Route(model, body.stream)
    names = outside(headers, target)
    if model := known(names, demand):
        return Route(model, body is not None and body.stream)
    if upload.fault is not None:
        raise upload.fault
    if body is not None and body.kind not in {"string", "null"}:
        raise asked.not_a_name(body)
    if body is not None and body.model:
        names.insert(0, body.model)
    if names:
        raise unknown(names[0], demand)
    raise _missing(method, upload)


def unknown(name: str, demand: DemandReader) -> Refusal:
    """The refusal of a name that no model has."""
    message = str(UnknownModel(name, demand.models()))
    if why := flaw(name):
        message += f" ({why})"
    return Refusal(404, "model_not_found", message, param="model")


def _missing(method: str, upload: Upload) -> Refusal:
    if upload.empty:
        why = f"this {method} has no body that could"
    elif upload.asked is None:
        why = "its body is neither JSON nor a form"
    else:
        why = "its body has no `model`"
    how = f"name it as `model` in a JSON body or a form, in the header {MODEL}, in the path {PREFIX}<name>/..., or in the query"
    return Refusal(400, "model_missing", f"the request names no model ({why}): {how}", param="model")
