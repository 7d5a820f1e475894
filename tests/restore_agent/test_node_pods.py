"""The agent's view of its node's pods, where the API server fails: a server of the test's own answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml
from aiohttp import web

from restore_agent.kubernetes.node_pods import NodePods
from restore_agent.kubernetes.pod import Pod

POD = {"metadata": {"name": "chat", "namespace": "a", "uid": "u", "resourceVersion": "2"}}


class ApiServer:
    """Lists what it has; watches are refused."""

    def __init__(self) -> None:
        self.pods: list[dict[str, object]] = []
        self.listing = asyncio.Event()
        self.listing.set()
        self.lists = 0
        self.refusal = 503  # of a watch

    async def every(self, request: web.Request) -> web.Response:
        if "watch" in request.query:
            return web.json_response({"message": "the server is starting"}, status=self.refusal)
        self.lists += 1
        pods = list(self.pods)
        await self.listing.wait()
        return web.json_response({"metadata": {"resourceVersion": "1"}, "items": pods})

    async def one(self, _: web.Request) -> web.Response:
        return web.json_response(POD)


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiServer]:
    server = ApiServer()
    app = web.Application()
    app.add_routes([web.get("/api/v1/pods", server.every), web.get("/api/v1/namespaces/a/pods/chat", server.one)])
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    named = {"name": "it", "cluster": {"server": f"http://127.0.0.1:{runner.addresses[0][1]}"}}
    context = {"name": "it", "context": {"cluster": "it", "user": "it"}}
    kubeconfig = {"clusters": [named], "contexts": [context], "users": [{"name": "it", "user": {}}], "current-context": "it"}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    try:
        yield server
    finally:
        server.listing.set()
        await runner.cleanup()


async def test_a_pod_that_calls_while_the_watch_is_broken_is_known(server: ApiServer) -> None:
    """It was taken for one that is being deleted, and its requests waited for ever."""
    async with NodePods.followed("node") as node_pods:
        server.listing.clear()
        gone: asyncio.Future[Pod] = asyncio.get_running_loop().create_future()
        node_pods.on_change(lambda pod, is_gone: gone.set_result(pod) if is_gone else None)
        found = await node_pods.pod("u", "a", "chat")
        assert found and node_pods.pods == {"u": found}
        assert await node_pods.pod("another", "a", "chat") is None
        server.listing.set()  # it is in no list: it went while nobody watched
        async with asyncio.timeout(10):
            assert (await gone).metadata.uid == "u"
        assert not node_pods.pods


async def test_a_list_that_was_made_before_a_pod_called_does_not_drop_it(server: ApiServer) -> None:
    server.refusal = 410  # so it lists again and again
    async with NodePods.followed("node") as node_pods, asyncio.timeout(20):
        gone: list[Pod] = []
        node_pods.on_change(lambda pod, is_gone: gone.append(pod) if is_gone else None)
        server.listing.clear()
        made = server.lists
        while server.lists == made:
            await asyncio.sleep(0.01)  # until the server has made a list, which it keeps
        assert await node_pods.pod("u", "a", "chat")
        server.pods.append(POD)
        server.listing.set()
        while server.lists < made + 3:
            await asyncio.sleep(0.01)
        assert not gone
        assert "u" in node_pods.pods
