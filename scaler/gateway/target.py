"""A request's target: the path that the engine gets, and the model that a prefix `/models/<name>/` names. Pure.

A name may have slashes, as it is (`/models/org/model/v1/...`) or escaped (`org%2Fmodel`): the longest name that is known is the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from scaler.gateway.refusal import Refusal

PREFIX = "/models/"
_SEGMENTS = 32  # of a path, that a name may take


class Target(NamedTuple):
    """A request's target.

    path: as the engine gets it, query included, percent-encoding untouched; model: named by the path, or empty; prefix: what was taken off
    the path for that, as it stood there.
    """

    path: str
    model: str = ""
    prefix: str = ""


def read_target(raw: str, known: Callable[[str], bool] = lambda name: False) -> Target:
    """Splits `/models/<name>` off a request's raw target. Raises: Refusal if it is not a path."""
    if raw == "*":  # OPTIONS only; of all that there is
        return Target(raw)
    if not raw.startswith("/"):
        raw = _path(raw)
    if not raw.startswith(PREFIX):
        return Target(raw)
    path, mark, query = raw.partition("?")
    segments = path[len(PREFIX) :].split("/")
    names = [unquote("/".join(segments[:count])) for count in range(1, min(len(segments), _SEGMENTS) + 1)]
    count = next((count for count in range(len(names), 0, -1) if known(names[count - 1])), 0) or _guessed(segments)
    name = names[count - 1]
    if not name:
        raise Refusal(404, "model_not_found", f"the path names no model: it is {PREFIX}<name>/...", param="model")
    prefix = PREFIX + "/".join(segments[:count])
    return Target("/" + "/".join(segments[count:]) + mark + query, name, prefix)


def _guessed(segments: list[str]) -> int:
    """Of how many segments a name consists that nobody knows: what stands before the API's own path, or the first."""
    try:
        return max(1, segments.index("v1", 1))
    except ValueError:
        return 1


def _path(raw: str) -> str:
    """The path of a target in absolute form. What it says besides is not told to anybody: it may be a secret."""
    try:
        split = urlsplit(raw)
    except ValueError:
        split = None
    if split is None or split.scheme not in {"http", "https"}:
        raise Refusal(400, "bad_target", "the request's target is not a path: it begins with / or http://")
    rest = raw[len(split.scheme) + 3 + len(split.netloc) :]
    return rest if rest.startswith("/") else f"/{rest}"
