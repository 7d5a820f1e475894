"""The lease that makes a leader, and what becomes of one that cannot hold it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from scaler.kubernetes.election import lead
from tests.worlds.kubernetes_api import Api
from tests.worlds.waiting import until
from zerowake_shared.kubernetes.cluster import Cluster

LEASE_SECONDS = 2  # and the other times in about the proportions that they have


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
async def cluster(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    for name, seconds in {"_LEASE_SECONDS": LEASE_SECONDS, "_STOP_SECONDS": 1.0, "_RETRY_SECONDS": 0.2, "_CALL_SECONDS": 0.3}.items():
        monkeypatch.setattr(f"scaler.kubernetes.election.{name}", seconds)
    async with api.connected(tmp_path, monkeypatch) as cluster:
        yield cluster


class Leader:
    """Counts how many lead at once."""

    def __init__(self) -> None:
        self.leading: set[str] = set()
        self.terms: list[str] = []

    async def lead(self, name: str) -> None:
        self.leading.add(name)
        self.terms.append(name)
        assert len(self.leading) == 1, f"{self.leading} lead at once"
        try:
            await asyncio.Event().wait()
        finally:
            self.leading.discard(name)


async def test_one_leads_and_hands_over(api: Api, cluster: Cluster) -> None:
    leader = Leader()

    def candidate(name: str) -> asyncio.Task[None]:
        return asyncio.create_task(lead(cluster, "zerowake", "controller", name, lambda: leader.lead(name)))

    first = candidate("first")
    await until(lambda: leader.leading == {"first"})
    second = candidate("second")
    await asyncio.sleep(0.25)  # the time of one try
    assert leader.leading == {"first"}
    first.cancel()
    await asyncio.wait([first])
    # A lease that is handed back is taken at the next try, not when it has run out.
    await until(lambda: leader.leading == {"second"}, within=LEASE_SECONDS - 0.5)
    second.cancel()
    await asyncio.wait([second])
    assert leader.terms == ["first", "second"]
    held = api.get("leases", "zerowake", "controller")
    assert held and "holderIdentity" not in held["spec"]


async def test_work_that_fails_gives_the_lease_away_and_is_tried_again(cluster: Cluster) -> None:
    begun = 0

    async def work() -> None:
        nonlocal begun
        begun += 1
        raise RuntimeError("broken")

    task = asyncio.create_task(lead(cluster, "zerowake", "controller", "one", work))
    await until(lambda: begun == 2)
    task.cancel()
    await asyncio.wait([task])


async def test_a_leader_whose_api_server_hangs_stops_before_its_lease_ends(api: Api, cluster: Cluster) -> None:
    leader = Leader()
    task = asyncio.create_task(lead(cluster, "zerowake", "controller", "one", lambda: leader.lead("one")))
    await until(lambda: leader.leading)
    api.hung = True
    begun = asyncio.get_running_loop().time()
    await until(lambda: not leader.leading)
    assert asyncio.get_running_loop().time() - begun < LEASE_SECONDS, "somebody else may have the lease by now"
    api.hung = False
    await until(lambda: leader.leading)
    task.cancel()
    await asyncio.wait([task])
