"""A request's target: the path that the engine gets, and the model that a prefix `/models/<name>/` names. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from scaler.gateway.refusal import Refusal

PREFIX = "/models/"


@dataclass(frozen=True, slots=True)
class Target:
    """A request's target. path: as the engine gets it, query included, percent-encoding untouched; model: named by the path, or empty."""

    path: str
    model: str = ""


def read_target(raw: str) -> Target:
    """Splits `/models/<name>` off a request's raw target. Raises: Refusal if it is not a path."""
    if not raw.startswith("/"):
        split = urlsplit(raw)
        if split.scheme not in {"http", "https"}:
            raise Refusal(400, "bad_target", f"the request's target {raw!r} is not a path")
        raw = (split.path or "/") + (f"?{split.query}" if split.query else "")
    if not raw.startswith(PREFIX):
        return Target(raw)
    path, mark, query = raw.partition("?")
    name, _, rest = path[len(PREFIX) :].partition("/")
    if not name:
        raise Refusal(404, "model_not_found", f"the path {path!r} names no model: it is {PREFIX}<name>/...", param="model")
    return Target(f"/{rest}{mark}{query}", unquote(name))
