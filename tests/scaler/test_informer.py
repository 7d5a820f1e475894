"""The live copy of the cluster's objects, through what API servers and networks do to it; and the lease that makes a leader."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from scaler.kubernetes.cluster import NODES, PODS, Cluster, ClusterError, Conflict, NotFound
from scaler.kubernetes.election import lead
from scaler.kubernetes.resources import Meta, Metadata
from tests.worlds.kubernetes_api import Api
from tests.worlds.waiting import until


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
async def cluster(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    async with api.serve(tmp_path) as config:
        monkeypatch.setenv("KUBECONFIG", str(config))
        async with Cluster.connect() as cluster:
            yield cluster


def pod(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "tenant", "labels": labels}}


async def test_it_lists_in_pages_and_follows(api: Api, cluster: Cluster) -> None:
    api.page = 2
    for number in range(5):
        await api.put("pods", pod(f"p{number}", kind="capture"))
    await api.put("pods", pod("other"))
    seen: list[tuple[str | None, str | None]] = []
    async with cluster.follow(PODS, Meta, labels="kind") as pods:
        await until(pods.synced.is_set)
        assert {each.metadata.name for each in pods} == {f"p{number}" for number in range(5)}
        pods.on_change(lambda old, new: seen.append((old and old.metadata.name, new and new.metadata.name)))
        assert seen == [(None, f"p{number}") for number in range(5)], "whoever comes later is told what is there"
        seen.clear()
        await api.put("pods", pod("p5", kind="capture"))
        await api.change("pods", "tenant", "p1", {"metadata": {"labels": {"more": "1"}}})
        await api.remove("pods", "tenant", "p0")
        await until(lambda: len(seen) == 3)
    assert seen == [(None, "p5"), ("p1", "p1"), ("p0", None)]


async def test_a_cut_stream_goes_on_where_it_was(api: Api, cluster: Cluster) -> None:
    await api.put("pods", pod("a"))
    async with cluster.follow(PODS, Meta) as pods:
        await until(pods.synced.is_set)
        await api.put("pods", pod("b"))
        await until(lambda: pods.get("tenant", "b"))
        await api.cut()
        await api.put("pods", pod("c"))
        await until(lambda: pods.get("tenant", "c"))
    lists = [path for _, path in api.requests if "watch" not in path]
    assert len(lists) == 1, "nothing was listed anew"


async def test_a_version_that_is_too_old_makes_it_list_again(api: Api, cluster: Cluster) -> None:
    for name in ("a", "b"):
        await api.put("pods", pod(name))
    gone: list[str] = []
    async with cluster.follow(PODS, Meta) as pods:
        await until(pods.synced.is_set)
        pods.on_change(lambda old, new: gone.append(old.metadata.name) if old and not new else None)
        api.refuse.append(("GET", "watch=true", 503, "starting"))  # while it is away:
        await api.cut()
        await api.remove("pods", "tenant", "a")
        await api.put("pods", pod("c"))
        api.log.clear()
        api.forget()
        await until(lambda: pods.get("tenant", "c") and not pods.get("tenant", "a"))
    assert gone == ["a"], "what vanished meanwhile is told"


async def test_bookmarks_move_it_on(api: Api, cluster: Cluster) -> None:
    await api.put("pods", pod("a"))
    async with cluster.follow(PODS, Meta) as pods:
        await until(pods.synced.is_set)
        for _ in range(3):
            await api.bookmark()
        await until(lambda: any("watch" in path for _, path in api.requests))
        await asyncio.sleep(0.1)
        api.forget()  # all but the last bookmark's version
        await api.cut()
        await api.put("pods", pod("b"))
        await until(lambda: pods.get("tenant", "b"))
    assert len([path for _, path in api.requests if "watch" not in path]) == 1


async def test_an_odd_object_hides_no_other(api: Api, cluster: Cluster) -> None:
    await api.put("pods", {"metadata": {"name": "odd", "namespace": "tenant", "labels": {"a": 1}}})
    await api.put("pods", pod("good"))
    async with cluster.follow(PODS, Meta) as pods:
        await until(pods.synced.is_set)
        assert [each.metadata.name for each in pods] == ["good"]


async def test_a_dead_api_server_is_waited_for(api: Api, cluster: Cluster) -> None:
    for _ in range(3):
        api.refuse.append(("GET", "/api/v1/pods", 500, "etcdserver: no leader"))
    await api.put("pods", pod("a"))
    async with cluster.follow(PODS, Meta) as pods:
        await until(pods.synced.is_set)
        assert pods.get("tenant", "a")


async def test_errors_name_what_was_asked(api: Api, cluster: Cluster) -> None:
    with pytest.raises(NotFound, match=r"GET /api/v1/nodes/nowhere: .*not found.*404"):
        await cluster.get(NODES, "", "nowhere", Meta)
    api.refuse.append(("POST", "pods", 403, 'pods "x" is forbidden: exceeded quota'))
    with pytest.raises(ClusterError, match="exceeded quota") as refused:
        await cluster.create(PODS, "tenant", {"metadata": {"name": "x"}})
    assert refused.value.status == 403
    made = await api.put("pods", pod("a"))
    with pytest.raises(Conflict):
        await cluster.patch(PODS, "tenant", "a", {"metadata": {"resourceVersion": "0", "labels": {"x": "y"}}})
    await cluster.delete(PODS, "tenant", "a", uid="another")
    assert api.get("pods", "tenant", "a") == made, "a later pod of the same name is not deleted"
    await cluster.delete(PODS, "tenant", "a", uid=made["metadata"]["uid"])
    await cluster.delete(PODS, "tenant", "a")
    assert api.get("pods", "tenant", "a") is None


async def test_the_same_event_is_told_once(api: Api, cluster: Cluster) -> None:
    about = Metadata(name="chat", namespace="tenant", uid="u", resource_version="1")
    for _ in range(3):
        await cluster.event(PODS, about, "Warning", "CaptureFailed", "no room", "Capture")
    await cluster.event(PODS, about, "Warning", "CaptureFailed", "x" * 5000, "Capture")
    notes = [each["note"] for each in api.all("events")]
    assert notes[0] == "no room" and len(notes) == 2 and len(notes[1]) == 1000
    api.refuse.append(("POST", "events", 500, "no"))
    await cluster.event(PODS, about, "Normal", "Captured", "lost", "Capture")


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
    await asyncio.sleep(2.5)
    assert leader.leading == {"first"}
    first.cancel()
    await asyncio.wait([first])
    # A lease that is handed back is taken at the next try (2 s), not when it has run out (15 s).
    await until(lambda: leader.leading == {"second"}, 4)
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
    await until(lambda: begun == 2, 10)
    task.cancel()
    await asyncio.wait([task])


async def test_a_leader_whose_api_server_hangs_stops_before_its_lease_ends(api: Api, cluster: Cluster) -> None:
    leader = Leader()
    task = asyncio.create_task(lead(cluster, "zerowake", "controller", "one", lambda: leader.lead("one")))
    await until(lambda: leader.leading)
    api.hung = True
    begun = asyncio.get_running_loop().time()
    await until(lambda: not leader.leading, 20)
    assert asyncio.get_running_loop().time() - begun < 15, "somebody else may have the lease by now"
    api.hung = False
    await until(lambda: leader.leading, 25)
    task.cancel()
    await asyncio.wait([task])
