"""A model that nobody asks for a long time, on Kubernetes with a real KEDA: is it woken as at first?

    python -m tests.bench.long_idle [--minutes 45] [--keep]

On the cluster of `make cluster`, zerowake as its chart installs it. The model is asked five times at zero, and goes back each time. Then
KEDA is told to poll its scaler once a day, so that nothing but a push can wake the model, and nobody asks for so many minutes, longer than
a stream of KEDA's or a connection lives. Each minute: pods of the model, and streams that KEDA holds. Then it is asked once more.

KEDA 2.21 may lose its stream for good as its ScaledObject is changed: the loop that ends clears the cache of which the one that begins
takes its scalers, and where it is first there are none to run. So the change is made again until a stream is there, and the changes that
lost it are a figure.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import sys
import time
from typing import Any

import aiohttp
from rich.console import Console

from tests.bench.figures import Figure
from tests.bench.shown import shown
from tests.bench.timeline import activations
from tests.e2e.api import Api
from tests.e2e.cluster.control import NOT_RUNNING, import_archives, running
from tests.e2e.cluster.images import build
from tests.e2e.cluster.layout import KUBECONFIG
from tests.e2e.release import MODEL, Release, own_namespace, release

FIRST = 5
POLLING_SECONDS = 86400
CHANGES = 10  # of the ScaledObject at most, until KEDA holds a stream again
STREAM_SECONDS = 10.0  # in which it is there, or will not come
SLACK = 0.5  # seconds that it may take longer than the slowest of the first ones
_STREAMS = re.compile(r'^zerowake_keda_streams_open\{rpc="StreamIsActive"\} (\S+)$', re.MULTILINE)


async def asked(installed: Release, client: aiohttp.ClientSession, answers: set[str]) -> float:
    """Seconds to the whole answer, at zero."""
    await installed.at_zero()
    began = time.monotonic()
    answers.add(str(await installed.ask(client)))
    return time.monotonic() - began


async def streams(installed: Release) -> int:
    """That KEDA holds, over all replicas of the scaler."""
    held = 0.0
    for pod in await installed.pods("zerowake-scaler"):
        page = f"/api/v1/namespaces/{installed.namespace}/pods/{pod['metadata']['name']}:9090/proxy/metrics"
        found = _STREAMS.search(await installed.run("kubectl", "get", "--raw", page))
        held += float(found[1]) if found else 0.0
    return int(held)


async def left_to_the_push(installed: Release) -> int:
    """KEDA polls no more, and holds a stream. Returns how many changes of the ScaledObject have lost it."""
    for lost in range(CHANGES):
        await installed.scaled(MODEL, pollingInterval=POLLING_SECONDS + lost)
        deadline = time.monotonic() + STREAM_SECONDS
        while time.monotonic() < deadline:
            if await streams(installed):
                await asyncio.sleep(2)  # it may have been the one that ends
                if await streams(installed):
                    return lost
            await asyncio.sleep(0.5)
    raise RuntimeError(f"after {CHANGES} changes of the ScaledObject KEDA holds no stream")


async def idle(installed: Release, minutes: float, console: Console) -> list[dict[str, Any]]:
    """What was seen each minute."""
    began, seen = time.monotonic(), []
    while (passed := time.monotonic() - began) < minutes * 60:
        await asyncio.sleep(min(60.0, minutes * 60 - passed))  # time in which nobody asks is what is measured
        pods = await installed.api.list("Pod", installed.namespace, f"app={MODEL}")
        seen.append({"minute": round((time.monotonic() - began) / 60, 2), "pods": len(pods), "streams": await streams(installed)})
        console.print(f"  {seen[-1]}")
    return seen


async def measured(minutes: float, console: Console) -> tuple[list[Figure], dict[str, Any]]:
    answers: set[str] = set()
    async with (
        Api.connect(str(KUBECONFIG)) as api,
        own_namespace(api, "idle") as namespace,
        release(api, str(KUBECONFIG), namespace) as installed,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as client,
    ):
        await installed.model()
        await asked(installed, client, answers)  # what any node in use has warm
        first = [await asked(installed, client, answers) for _ in range(FIRST)]
        await installed.at_zero()
        lost = await left_to_the_push(installed)
        console.print(f"  {lost} changes of the ScaledObject have lost KEDA's stream")
        seen = await idle(installed, minutes, console)
        last = await asked(installed, client, answers)
        told = max(await activations(api, namespace, MODEL), key=lambda each: each["ended"])
    slept = f"after {seen[-1]['minute']:g} minutes at zero; KEDA polls once a day"
    figures = [
        Figure(
            "asked at zero, at first", statistics.median(first), "s", detail=f"median of {FIRST}, {min(first):.3f} to {max(first):.3f} s"
        ),
        Figure("asked at zero, after the long idle", last, "s", at_most=max(first) + SLACK, detail=slept),
        Figure("different answers", len(answers), "", at_most=1),
        Figure("pods of the model while nobody asked", max(each["pods"] for each in seen), "", at_most=0, detail="the most of any minute"),
        Figure("changes of the ScaledObject that lost KEDA's stream", lost, "", detail=f"of {lost + 1}"),
        Figure("streams that KEDA held, least", min(each["streams"] for each in seen), "", at_least=1, detail="of any minute"),
    ]
    return figures, {"each minute": seen, "last activation": told}


def program() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.long_idle", description="a model that nobody asks for a long time")
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--keep", action="store_true", help="in results/long-idle.json")
    given = parser.parse_args()
    if not running():
        print(NOT_RUNNING, file=sys.stderr)
        return 2
    import_archives(build())
    console = Console(highlight=False, soft_wrap=True)
    figures, more = asyncio.run(measured(given.minutes, console))
    command = f"python -m tests.bench.long_idle --minutes {given.minutes:g}"
    return shown(console, figures, "long-idle" if given.keep else "", command, more)


if __name__ == "__main__":
    sys.exit(program())
