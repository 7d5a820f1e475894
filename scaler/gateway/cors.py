"""What browsers ask before a page of another origin may speak to the gateway (CORS), and what they need to show its answers. Pure.

A preflight names no model in most cases, and must not wake an engine. So the gateway answers by itself, and permits all: whether a page may
read an engine's answer is said by the headers of that answer, which are the engine's (vLLM, SGLang and llama.cpp permit every origin unless
told otherwise). A preflight for a model that has a ready replica is the engine's to answer, since its rules may be others. Cookies are
never permitted here: keys in `Authorization` are what the API has.
"""

from __future__ import annotations

from collections.abc import Mapping

from scaler.gateway.answer_parser import Fields, Head
from scaler.gateway.wait import ACTIVATION, ORIGIN, TIMING

METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
# A page of any origin may read what the gateway itself says: a browser hides an error without these.
READABLE = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": f"Retry-After, {TIMING}, {ACTIVATION}, {ORIGIN}",
    "Timing-Allow-Origin": "*",
}
_KEPT_SECONDS = 600  # by the browser


def permission(asked: Mapping[str, str]) -> dict[str, str]:
    """The headers of the answer to an OPTIONS request with the headers `asked`."""
    headers = {"Allow": METHODS, **READABLE}
    if "Access-Control-Request-Method" not in asked:
        return headers
    headers["Access-Control-Allow-Methods"] = METHODS
    headers["Access-Control-Max-Age"] = str(_KEPT_SECONDS)
    headers["Vary"] = "Access-Control-Request-Headers"
    if wanted := asked.get("Access-Control-Request-Headers"):
        headers["Access-Control-Allow-Headers"] = wanted  # `*` would leave Authorization out
    return headers


def exposed(head: Head, told: Fields) -> Fields:
    """What a page that may read an engine's answer, by the engine's own word, needs to read what the gateway has added to it."""
    permitted = head.get(b"access-control-allow-origin")
    if not permitted:
        return []
    names = b", ".join(name for name, _ in told)
    fields = [(b"Access-Control-Expose-Headers", names)]
    if TIMING.encode() in names:  # what a browser itself measures, and this list, it shows to origins that are named here
        fields.append((b"Timing-Allow-Origin", permitted))
    return fields
