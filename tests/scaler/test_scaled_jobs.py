"""A ScaledJob told from a ScaledObject, by the list and by the API server."""

from typing import Any

from scaler.kubernetes.scaled_jobs import ScaledJobs
from tests.worlds.virtual_time import StandingClock
from zerowake_shared.kubernetes.errors import ClusterError, NotFound
from zerowake_shared.kubernetes.resource import Resource


class Api:
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.error: Exception | None = NotFound(404, "GET", "not found")

    async def get(self, resource: Resource, namespace: str, name: str, kind: type[Any], subresource: str = "") -> Any:
        self.asked.append(f"{resource.plural} {namespace}/{name}")
        if self.error:
            raise self.error
        return None


class Listed:
    def get(self, namespace: str, name: str) -> object | None:
        return object() if name == "listed" else None


async def test_only_what_is_surely_no_scaled_object_is_refused() -> None:
    api, clock = Api(), StandingClock()
    jobs = ScaledJobs(api, Listed(), clock)
    assert not await jobs.why_not("tenant", "listed") and not api.asked
    assert "no ScaledObject tenant/job" in await jobs.why_not("tenant", "job")
    assert "ScaledJob" in await jobs.why_not("tenant", "job") and api.asked == ["scaledobjects tenant/job"]
    api.error = ClusterError(0, "GET", "no answer")
    assert not await jobs.why_not("tenant", "another"), "a cluster that does not answer refuses nobody"
    api.error = None
    assert not await jobs.why_not("tenant", "new"), "made a moment ago"
    clock.moment += 11.0
    assert not await jobs.why_not("tenant", "job"), "made since"
