"""The canary: one real request whose answer stands in the manifest, asked again of a restored replica.

Health says too little: a replica restored without its tile registers answers `/health` and dies on its first matrix. The answer must be
the same but for what differs between any two answers; log-probabilities and other floats may differ by 1e-3 (vLLM's own tolerance).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import aiohttp

from restore_agent.engine.engine import Engine, EngineError
from restore_agent.errors import AgentError
from restore_agent.snapshots.manifest import CanaryRecord
from zerowake_shared.json_text import parsed

TOLERANCE = 1e-3
_PASSING = frozenset({"id", "created", "created_at", "request_id", "system_fingerprint", "timestamp", "timings"})
_NOTHING: Mapping[str, object] = MappingProxyType({})


class Unproved(AgentError):
    """A replica did not give the answer that stands in the manifest."""

    reason = "unproved"


async def record_canary(engine: Engine, path: str, body: str, asks: Mapping[str, object] = _NOTHING) -> CanaryRecord:
    """Asks the engine that will be, or has been, dumped. With no path, the first of the usual ones that it answers.

    asks: members for the bodies of the usual ones, such as another name that the engine answers to.

    Raises:
        EngineError: no 200.
    """
    async with engine.session() as session:
        if path:
            return await _ask(engine, session, path, body)
        refused = []
        for candidate, question in await _usual(engine, session):
            try:
                return await _ask(engine, session, candidate, json.dumps({**question, **asks}))
            except EngineError as error:
                refused.append(str(error))
    raise EngineError("no real request was answered; name one with --canary PATH=JSON: " + "; ".join(refused))


async def prove_canary(engine: Engine, canary: CanaryRecord, whose: str = "the restored engine") -> None:
    """Asks a restored engine. `whose`: the answer is, in words.

    Raises:
        Unproved: it answers otherwise, or not at all.
    """
    try:
        async with engine.session() as session:
            answer = await _ask(engine, session, canary.path, canary.body)
    except EngineError as error:
        raise Unproved(f"{whose} did not answer the recorded request: {error}{engine.output.tail()}") from None
    if difference := next(_differences(_parsed(canary.answer), _parsed(answer.answer)), None):
        raise Unproved(f"{whose} answers the recorded request ({canary.path}) otherwise: {difference}")


async def _ask(engine: Engine, session: aiohttp.ClientSession, path: str, body: str) -> CanaryRecord:
    answer = await engine.ask(session, path, body)
    if answer.status != 200:
        raise EngineError(f"{path} answers {answer.status}: {answer.body[:200]}")
    return CanaryRecord(path=path, body=body, answer=answer.body)


async def _usual(engine: Engine, session: aiohttp.ClientSession) -> Iterator[tuple[str, dict[str, object]]]:
    model = "default"
    with contextlib.suppress(EngineError, ValueError, LookupError, TypeError):  # no such list: the name may not matter
        model = str(parsed((await engine.ask(session, "/v1/models")).body)["data"][0]["id"])
    chat = {"model": model, "messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 4, "temperature": 0, "seed": 1}
    return iter(
        [
            ("/v1/chat/completions", {**chat, "logprobs": True}),
            ("/v1/chat/completions", chat),
            ("/v1/completions", {"model": model, "prompt": "One, two,", "max_tokens": 4, "temperature": 0, "seed": 1}),
            ("/v1/embeddings", {"model": model, "input": "Name a colour."}),
        ]
    )


def _parsed(text: str) -> object:
    try:
        return parsed(text)
    except ValueError:
        return text


def _differences(expected: object, got: object, at: str = "answer") -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in sorted((expected.keys() | got.keys()) - _PASSING):
            yield from _differences(expected.get(key), got.get(key), f"{at}.{key}")
    elif isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        for i, (one, other) in enumerate(zip(expected, got, strict=True)):
            yield from _differences(one, other, f"{at}[{i}]")
    elif isinstance(expected, float) and isinstance(got, float):
        if not math.isclose(expected, got, abs_tol=TOLERANCE):
            yield f"{at} is {got}, was {expected}"
    elif expected != got:
        yield f"{at} is {got!r}, was {expected!r}"[:300]
