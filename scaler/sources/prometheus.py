"""Demand as a Prometheus query has it: one number, of a scalar or of a vector with a single sample.

A vector without a sample is no zero. It is what a query gives when its target is down, or when its name is mistyped, and a model that was
scaled to zero by that would be the wrong answer to an exporter's end. Whoever means zero says so: `sum(jobs) or vector(0)`. More samples
than one are an error, too: `sum(…)` or `max(…)` say what is meant.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from scaler.sources.page import Page
from scaler.sources.source import HttpUrl, Lookup, Polled, Reading, SourceError, Surroundings, whole
from zerowake_shared.json_text import parsed

_MOST_BYTES = 1 << 20


class PrometheusDeclaration(Polled):
    """url: of the server, as a browser opens it; query: in PromQL."""

    type: Literal["prometheus"]
    url: HttpUrl
    query: Annotated[str, Field(min_length=1)]
    interval_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 15.0

    @property
    def says(self) -> str:
        return f"query {self.query} at {self.url}"

    def open(self, model: str, around: Surroundings) -> PrometheusQuery:
        return PrometheusQuery(self.url, self.query, around.lookup)


class PrometheusQuery:
    """One query."""

    def __init__(self, url: str, query: str, lookup: Lookup | None) -> None:
        self._page = Page(f"{url}/api/v1/query", _MOST_BYTES, lookup=lookup)
        self._query = query

    async def read(self) -> Reading:
        return Reading(self._number(*await self._page.get({"query": self._query})))

    async def close(self) -> None:
        await self._page.close()

    def _number(self, status: int, body: bytes) -> int:
        try:
            answer = parsed(body)
            if answer["status"] != "success":
                raise SourceError(f"the query {self._query} failed: {answer.get('error', 'no reason was given')}")
            found = _sample(answer["data"])
            value = float(found)
        except SourceError as error:
            raise SourceError(f"{error} (query {self._query})") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise SourceError(f"status {status}, and no answer of Prometheus: {body[:80]!r} (query {self._query})") from None
        return whole(value, f"{found} (query {self._query})")


def _sample(data: dict[str, Any]) -> str:
    """The one number. Raises: SourceError, and what is raised by an answer of another form."""
    kind, result = data["resultType"], data["result"]
    if kind == "scalar":
        return str(result[1])
    if kind != "vector":
        raise SourceError(f"it gives a {kind}: a query for a scalar or a vector is needed")
    if not result:
        raise SourceError("it gives no sample, which is no zero: its target may be down. Where it is one, write: QUERY or vector(0)")
    if len(result) > 1:
        raise SourceError(f"it gives {len(result)} samples: make one of them, by sum(…) or max(…)")
    if "value" not in result[0]:
        raise SourceError("its sample is a histogram: make a number of it")
    return str(result[0]["value"][1])
