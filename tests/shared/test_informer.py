"""The live copy of the cluster's objects, through what API servers and networks do to it."""

import asyncio

import pytest

from tests.worlds.bare_object import Meta, Metadata, pod
from tests.worlds.kubernetes_api import Api
from tests.worlds.waiting import until
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.resource import PODS


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


async def test_an_object_that_becomes_odd_is_known_as_it_was(api: Api, cluster: Cluster) -> None:
    """It is there still, so nobody may be told that it has gone: by a watch as by a list."""
    await api.put("pods", pod("one"))
    seen: list[Meta | None] = []
    async with cluster.follow(PODS, Meta) as pods:
        await until(pods.synced.is_set)
        pods.on_change(lambda _, new: seen.append(new))
        await api.change("pods", "tenant", "one", {"metadata": {"labels": {"number": 7}}})
        await api.put("pods", pod("two"))
        await until(lambda: pods.get("tenant", "two"))
        api.oldest = api.version + 1  # it lists again
        await api.cut()
        await api.put("pods", pod("three"))
        await until(lambda: pods.get("tenant", "three"))
        assert pods.get("tenant", "one") and None not in seen


async def test_a_listener_that_fails_takes_nothing_from_the_others(
    api: Api, cluster: Cluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor from itself: it hears of what comes later, and of the same again at the next resync."""
    heard: list[str] = []
    failed: list[str] = []

    def fails(_: Meta | None, new: Meta | None) -> None:
        if new and new.metadata.name == "odd" and not failed:
            failed.append("odd")
            raise ZeroDivisionError("a bug")
        heard.append(f"first {new.metadata.name if new else None}")

    pods = cluster.follow(PODS, Meta)
    pods._resync = 0.2
    pods.on_change(fails)
    pods.on_change(lambda _, new: heard.append(f"second {new.metadata.name if new else None}"))
    async with pods:
        await until(pods.synced.is_set)
        await api.put("pods", pod("odd"))
        await api.put("pods", pod("next"))
        await until(lambda: "first next" in heard and "second odd" in heard)
        await until(lambda: "first odd" in heard)
    assert "a bug" in caplog.text


async def test_a_dead_api_server_is_waited_for(api: Api, cluster: Cluster) -> None:
    for _ in range(3):
        api.refuse.append(("GET", "/api/v1/pods", 500, "etcdserver: no leader"))
    await api.put("pods", pod("a"))
    async with cluster.follow(PODS, Meta) as pods:
        await until(pods.synced.is_set)
        assert pods.get("tenant", "a")


async def test_what_was_shown_while_the_watch_was_broken_is_confirmed_or_goes(api: Api, cluster: Cluster) -> None:
    gone: list[str] = []
    async with cluster.follow(PODS, Meta) as pods:
        await until(pods.synced.is_set)
        await api.put("pods", pod("there"))
        await until(lambda: pods.get("tenant", "there"))  # by its watch
        pods.on_change(lambda old, new: gone.append(old.metadata.name) if old and not new else None)
        pods.show("tenant", "went", Meta(Metadata(name="went", namespace="tenant")))
        pods.show("tenant", "there", Meta(Metadata(name="there", namespace="tenant", uid="older")))
        assert {each.metadata.name for each in pods} == {"there", "went"}, "it counts at once"
        await api.cut()
        await until(lambda: gone == ["went"])
        found = pods.get("tenant", "there")
        assert found and found.metadata.uid != "older"


async def test_an_object_of_a_megabyte_is_one_line_of_a_watch(api: Api, cluster: Cluster) -> None:
    async with cluster.follow(PODS, Meta) as pods:
        await until(pods.synced.is_set)
        await api.put("pods", {**pod("large"), "note": "x" * 1_500_000})
        await until(lambda: pods.get("tenant", "large"))
    assert len([path for _, path in api.requests if "watch" in path]) == 1, "the stream did not break"
