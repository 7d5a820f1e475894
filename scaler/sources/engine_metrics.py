"""Demand as engines themselves count it: requests that wait in vLLM or SGLang, and those that they work on.

Of the model's replicas that this gateway knows, or, with `url`, of one engine elsewhere. A request that came through the gateway is counted
in the ledger already, so of a replica counts only what exceeds what the gateway itself has at it: what others ask it past the gateway. The
number of the gateway's requests is the larger one of those before and after the reading, since some begin and some end meanwhile. What
other gateways may have had in flight of the model at that time, at whichever replica, does not count either. An engine elsewhere counts
whole: the gateway asks none but the model's replicas.

Where no replica is, nothing can be asked past the gateway, which is a zero that is known. A replica that does not answer makes the reading
fail: what it would say may be what it is there for.
Of the ranks of one engine SGLang's first speaks for all. Only the lines that count are parsed: a page has thousands.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Annotated, Literal

from prometheus_client.parser import text_string_to_metric_families
from pydantic import Field

from scaler.gateway.dispatcher import Dispatcher
from scaler.sources.page import Page
from scaler.sources.source import Engine, HttpUrl, Polled, Reading, SourceError, Surroundings, whole
from zerowake_shared.background import first_error

_NAMES = (
    ("vllm:num_requests_waiting", "vllm:num_requests_running"),
    ("sglang:num_queue_reqs", "sglang:num_running_reqs"),
)
_ONE_RANK = ("tp_rank", "pp_rank")
_MOST_BYTES = 8 << 20
_PATH = "/metrics"


class EngineDeclaration(Polled):
    """url: of an engine's page of metrics; None: each replica of the model has one, at /metrics."""

    type: Literal["engine"]
    url: HttpUrl | None = None
    interval_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 2.0

    @property
    def says(self) -> str:
        return self.url or "the model's replicas"

    def open(self, model: str, around: Surroundings) -> EngineMetrics:
        return EngineMetrics(self.url, model, around)


def engines_of(dispatcher: Dispatcher, model: str) -> Sequence[Engine]:
    """The replicas of a model that the gateway sends requests to."""
    return [Engine(each.id, each.endpoint, functools.partial(dispatcher.in_flight, each.id)) for each in dispatcher.ready(model)]


class EngineMetrics:
    """All pages of one model, each over a connection that is kept while its replica is there."""

    def __init__(self, url: str | None, model: str, around: Surroundings) -> None:
        self._around = around
        self._model = model
        self._elsewhere = Page(url, _MOST_BYTES, lookup=around.lookup) if url else None
        self._pages: dict[Engine, Page] = {}

    async def read(self) -> Reading:
        if self._elsewhere is not None:
            return Reading(_requests(*await self._elsewhere.get()))
        engines, others = self._around.engines(self._model), self._around.others(self._model)
        for gone in self._pages.keys() - set(engines):
            await self._pages.pop(gone).close()
        with first_error():
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(self._past_the_gateway(each), name=f"metrics of {each.id}") for each in engines]
        past = sum(each.result() for each in asked)
        return Reading(max(0, past - await others.most()) if past else 0)

    async def close(self) -> None:
        for page in [*self._pages.values(), *([self._elsewhere] if self._elsewhere else [])]:
            await page.close()
        self._pages.clear()

    async def _past_the_gateway(self, engine: Engine) -> int:
        before = engine.in_flight()
        try:
            page = self._pages.get(engine)
            if page is None:
                page = self._pages[engine] = Page.of(engine.endpoint, _PATH, _MOST_BYTES, self._around.lookup)
            requests = _requests(*await page.get())
        except (SourceError, OSError) as error:
            raise SourceError(f"replica {engine.id}: {error}") from None
        return max(0, requests - max(before, engine.in_flight()))


def _requests(status: int, body: bytes) -> int:
    """That wait and are worked on, by one page. Raises: SourceError."""
    if status != 200:
        raise SourceError(f"status {status} in place of a page of metrics")
    for names in _NAMES:
        lines = [line for line in body.decode(errors="replace").splitlines() if line.startswith(names)]
        try:
            families = list(text_string_to_metric_families("".join(f"{line}\n" for line in lines)))
        except (ValueError, LookupError, OverflowError) as error:
            raise SourceError(f"its metrics cannot be read: {error}") from None
        found = {name: [each for family in families for each in family.samples if each.name == name] for name in names}
        if not any(found.values()):
            continue
        if missing := [name for name in names if not found[name]]:
            raise SourceError(f"it has no {missing[0]}")
        first = [each for samples in found.values() for each in samples if all(each.labels.get(rank, "0") == "0" for rank in _ONE_RANK)]
        try:
            return sum(whole(float(each.value), f"{each.name} {each.value:g}") for each in first)
        except OverflowError:
            raise SourceError(f"its {names[0]} or {names[1]} is no number of requests") from None
    raise SourceError(f"it has neither {_NAMES[0][0]} nor {_NAMES[1][0]}: SGLang has its metrics with --enable-metrics")
