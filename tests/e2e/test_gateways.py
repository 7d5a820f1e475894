"""Two gateways and one engine, on a cluster without any agent: that they send it something, and never more than it takes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.e2e.api import Api
from tests.e2e.release import ENGINE, MODEL, Release, deployment, is_scaled, own_namespace, scaled_object, snapshot, to_install

pytestmark = [
    pytest.mark.own_cluster("reaches pods by their addresses"),
    pytest.mark.usefixtures("images", "reported"),
    pytest.mark.asyncio(loop_scope="module"),
]
REQUESTS = 10  # to each gateway
NO_AGENT = r"--set=agent.nodeSelector.zerowake\.dev/tests=none"
# With threads, as every real engine: how many requests it worked on at once is up to who asks.
SERVER = """
import http.server, json, threading, time

lock, now, most, seen = threading.Lock(), 0, 0, []

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        global now, most
        if self.path.startswith("/work"):
            with lock:
                now += 1
                most = max(most, now)
                seen.append(self.path)
            time.sleep(0.1)
            with lock:
                now -= 1
        data = json.dumps({"most": most, "seen": seen}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed(kubeconfig: str, images: None) -> AsyncIterator[Release]:
    """Two replicas of the scaler, no agent anywhere, and a model that nothing was captured of."""
    engine = {**ENGINE, "command": ["python3", "-uc", SERVER]}
    del engine["args"]
    model, workload = snapshot(), deployment()
    model["spec"]["template"]["spec"]["containers"] = [engine]
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    workload["spec"]["template"]["spec"]["containers"] = [{**engine, "readinessProbe": container["readinessProbe"]}]
    async with (
        Api.connect(kubeconfig) as api,
        own_namespace(api, "gateways") as namespace,
        to_install(api, kubeconfig, namespace) as made,
    ):
        await made.helm_upgrade(NO_AGENT)
        await made.find_gateway()
        await api.apply(model, workload, namespace=namespace)
        await api.apply(scaled_object(namespace, MODEL, cooldownPeriod=600), namespace=namespace)
        await api.until("ScaledObject", namespace, MODEL, is_scaled)
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield session


async def gateways(installed: Release) -> list[str]:
    """The addresses of those that run."""
    pods = await installed.pods("zerowake-scaler")
    return [pod["status"]["podIP"] for pod in pods if pod["status"].get("podIP") and not pod["metadata"].get("deletionTimestamp")]


async def ask(client: aiohttp.ClientSession, gateway: str, number: int) -> None:
    async with client.get(f"http://{gateway}:8080/models/{MODEL}/work/{gateway}/{number}") as answer:
        assert answer.status == 200, await answer.text()
        await answer.read()


async def engine(installed: Release, client: aiohttp.ClientSession) -> dict[str, Any]:
    """What the engine itself has seen so far."""
    (pod,) = await installed.api.list("Pod", installed.namespace, f"app={MODEL}")
    async with client.get(f"http://{pod['status']['podIP']}:8000/told") as answer:
        told: dict[str, Any] = await answer.json(content_type=None)
        return told


async def replicas(client: aiohttp.ClientSession, gateway: str) -> str:
    async with client.get(f"http://{gateway}:9090/metrics") as answer:
        page = await answer.text()
    return next((line.split()[-1] for line in page.splitlines() if line.startswith(f'zerowake_replicas{{model="{MODEL}"}}')), "")


async def test_a_model_is_served_from_zero_without_any_agent(installed: Release, client: aiohttp.ClientSession) -> None:
    for gateway in await gateways(installed):
        await ask(client, gateway, 0)
        assert await replicas(client, gateway) == "1.0"


async def test_two_gateways_never_send_more_than_the_engine_takes(installed: Release, client: aiohttp.ClientSession) -> None:
    there = await gateways(installed)
    assert len(there) == 2
    before = len((await engine(installed, client))["seen"])
    await asyncio.gather(*(ask(client, gateway, number) for number in range(REQUESTS) for gateway in there))
    told = await engine(installed, client)
    assert told["most"] == 1
    order = [path.split("/")[2] for path in told["seen"][before:]]
    assert Counter(order) == dict.fromkeys(there, REQUESTS)  # none lost, none done twice
    print("order:", "".join(str(there.index(gateway)) for gateway in order))
    first_half = Counter(order[:REQUESTS])
    assert max(first_half.values()) - min(first_half.get(gateway, 0) for gateway in there) <= 2  # and each in its turn
