"""LoRA adapters of an engine: each answers the model's canary in its own way, and that answer stands in the manifest, too.

An adapter is memory of its own beside the model's, which the model's answer does not touch: a replica can be right in one and wrong in the
other. Which there are, the engine says itself where it can:

    /v1/models       vLLM and SGLang list them, each with the `parent` that it adapts; asked for by `model`
    /lora-adapters   llama-server numbers them; asked for by `lora`, which leaves all others out
    named            by whoever takes the snapshot: what the server answers to besides (`--adapter`, a ModelSnapshot's `names`)

The question is the model's own, so that one who names a canary has named it for all of them. They are asked one after the other, in an
order that stands in the manifest: at once they would share batches, whose sums come out in another order each time, and so would a prefix
that was cached in between. What is asked of a restored engine is asked where it is proved, and not at each restore: that is free of it,
as it is of the canary.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import aiohttp

from restore_agent.engine.canary import Unproved, prove_canary, record_canary
from restore_agent.engine.engine import Engine, EngineError
from restore_agent.snapshots.manifest import AdapterRecord, CanaryRecord
from zerowake_shared.json_text import parsed


async def record_adapters(engine: Engine, canary: CanaryRecord, named: Sequence[str]) -> tuple[AdapterRecord, ...]:
    """Asks every adapter, right after the canary was recorded.

    Raises:
        EngineError: one does not answer, or they take longer together than the engine may to be ready.
    """
    found = await _adapters(engine, canary, named)
    recorded: list[AdapterRecord] = []
    seconds = engine.record.ready_timeout_seconds
    try:
        async with asyncio.timeout(seconds):
            for name, asks in found.items():
                recorded.append(await _record(engine, canary, name, asks))
    except TimeoutError:
        waited = next(name for name in found if name not in {each.name for each in recorded})
        raise EngineError(
            f"{len(recorded)} of {len(found)} adapters answered within the {seconds:.0f} s that the engine has to be ready, and "
            f"{waited!r} not yet; give it more time, or load fewer"
        ) from None
    return tuple(recorded)


async def prove_adapters(engine: Engine, adapters: Sequence[AdapterRecord]) -> None:
    """Asks a restored engine, right after the canary.

    Raises:
        Unproved: one answers otherwise, or not at all, or they take too long together.
    """
    seconds = engine.record.ready_timeout_seconds
    asked = ""
    try:
        async with asyncio.timeout(seconds):
            for adapter in adapters:
                asked = adapter.name
                await prove_canary(engine, adapter, f"adapter {asked!r} of the restored engine")
    except TimeoutError:
        raise Unproved(f"adapter {asked!r} of the restored engine had not answered when {seconds:.0f} s were over") from None


async def _record(engine: Engine, canary: CanaryRecord, name: str, asks: Mapping[str, object]) -> AdapterRecord:
    question = _question(canary)
    try:
        if question is None:  # of a canary that asks for no model
            answer = await record_canary(engine, "", "", asks)
        else:
            answer = await record_canary(engine, canary.path, json.dumps({**question, **asks}))
    except EngineError as error:
        raise EngineError(
            f"adapter {name!r} does not answer: {error}; have the server load it as it should, or take it out{engine.output.tail()}"
        ) from None
    return AdapterRecord(name=name, **answer.model_dump())


async def _adapters(engine: Engine, canary: CanaryRecord, named: Sequence[str]) -> dict[str, Mapping[str, object]]:
    """By name, what the body of a request says to reach each."""
    found: dict[str, Mapping[str, object]] = {}
    if _question(canary) is not None:
        async with engine.session() as session:
            for each in _list(await _said(engine, session, "/v1/models"), "data"):
                if isinstance(name := each.get("id"), str) and each.get("parent"):
                    found[name] = {"model": name}
            for each in _list(await _said(engine, session, "/lora-adapters")):
                if isinstance(each.get("id"), int):
                    file = PurePath(str(each.get("path", ""))).stem or str(each["id"])
                    found[file if file not in found else f"{file}#{each['id']}"] = {"lora": [{"id": each["id"], "scale": 1.0}]}
    return {**found, **{name: {"model": name} for name in named if name not in found}}


def _question(canary: CanaryRecord) -> dict[str, object] | None:
    """The body, where it is one that can name a model."""
    with contextlib.suppress(ValueError):
        if isinstance(body := json.loads(canary.body), dict):
            return body
    return None


async def _said(engine: Engine, session: aiohttp.ClientSession, path: str) -> object:
    """JSON, or None where it has no such path."""
    with contextlib.suppress(EngineError, ValueError):
        answer = await engine.ask(session, path)
        return parsed(answer.body) if answer.status == 200 else None
    return None


def _list(said: object, member: str = "") -> list[dict[str, object]]:
    """The objects of a list, or of a list that is a member; engines say many things under these paths."""
    if member:
        said = said.get(member) if isinstance(said, dict) else None
    return [each for each in said if isinstance(each, dict)] if isinstance(said, list) else []
