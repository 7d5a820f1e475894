"""The Grafana board: its file is what the code makes, its links lead to the runbook, and a real Prometheus answers each of its queries.

Grafana itself is not run; the board is made of the types of its own SDK for version 11.6.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from zerowake_proto import agent_pb2, agent_pb2_grpc

from deploy.prometheus.board import BOARD, MODELS, ROWS, text
from restore_agent.snapshots.catalog import Catalog
from tests.worlds.certificates import Authority
from tests.worlds.command import zerowake
from tests.worlds.gpumem_server import MIB, served
from tests.worlds.machine import Machine, machine
from tests.worlds.metric_catalogue import listed
from tests.worlds.ports import free_port
from tests.worlds.prometheus_server import prometheus_server
from tests.worlds.rules import alerts

ROOT = Path(__file__).parent.parent
_ENGINE, _PORT = Path(__file__).parent / "worlds/hashing_engine.py", 8000
QUERIES = [query for panels in ROWS.values() for panel in panels for query, _ in panel.queries]
# What no such data is made of here, and why.
WITHOUT_DATA = {
    'sum by (model) (zerowake_sleeping_replicas{model=~"$model"})': "pods sleep on Kubernetes alone; tests/e2e has them",
    "zerowake_node_gpu_bytes": "needs a GPU",
}


def test_the_file_is_what_the_code_makes() -> None:
    assert BOARD.read_text() == text(), "run `python deploy/prometheus/board.py`"


def test_a_query_asks_for_metrics_that_there_are_and_labels_that_these_have() -> None:
    series = {name: metric for metric in listed().values() for name in metric.series}
    for query in [*QUERIES, MODELS]:
        for metric, selectors in re.findall(r"(zerowake_\w+)(?:\{(.*?)\})?", query):
            assert metric in series, query
            assert set(re.findall(r"(\w+)\s*[=!]", selectors)) <= set(series[metric].labels), query


def test_every_alert_is_linked_from_a_panel_and_every_link_leads_to_the_runbook() -> None:
    headings = {heading.lower() for heading in re.findall(r"^## (\w+)$", (ROOT / "deploy/prometheus/RUNBOOK.md").read_text(), re.MULTILINE)}
    links = [link["url"] for panel in json.loads(BOARD.read_text())["panels"] for link in panel.get("links", [])]
    assert {link.removeprefix("${runbook}#") for link in links} <= headings
    assert {alert for panels in ROWS.values() for panel in panels for alert in panel.alerts} == alerts().keys()


def test_panels_lie_side_by_side_and_never_on_one_another() -> None:
    panels = json.loads(BOARD.read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


async def _unanswered(session: aiohttp.ClientSession, url: str) -> list[str]:
    """The queries to which Prometheus has no number."""
    found = []
    for query in QUERIES:
        asked = query.replace("$model", ".*").replace("$__rate_interval", "5m")
        async with session.get(f"{url}/api/v1/query", params={"query": asked}) as response:
            answer: dict[str, Any] = await response.json()
        assert answer["status"] == "success", (query, answer)
        if all(math.isnan(float(series["value"][1])) for series in answer["data"]["result"]):
            found.append(query)
    return found


async def _from_zero(made: Machine) -> None:
    """A scale-up, and what it made is gone again."""
    assert await made.ask("tiny", "/sum") == 200
    await made.until("scaler", 'zerowake_replicas{model="tiny"}', lambda value: value == 0)


async def _staged_again(state: Path) -> None:
    """`tiny` goes down to the disk and up into memory."""
    snapshot = agent_pb2.SnapshotRef(name="tiny")
    async with grpc.aio.insecure_channel(f"unix:{state}/agent.sock") as channel:
        agent = agent_pb2_grpc.AgentStub(channel)
        down = agent_pb2.UnstageRequest(request_id=uuid.uuid4().hex, snapshot=snapshot, rung=agent_pb2.RUNG_DISK)
        assert (await agent.Unstage(down)).residency.rung == agent_pb2.RUNG_DISK
        up = agent_pb2.StageRequest(request_id=uuid.uuid4().hex, snapshot=snapshot, rung=agent_pb2.RUNG_MEMORY)
        assert (await agent.Stage(up)).residency.rung == agent_pb2.RUNG_MEMORY


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for CRIU and namespaces")
async def test_every_query_has_an_answer_from_real_programs(tmp_path: Path) -> None:
    """One machine takes snapshots and has what can go wrong; another one fetches from its store."""
    (tmp_path / "weights.bin").write_bytes(os.urandom(1 << 20))
    (tmp_path / "store").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    store = f"file://{tmp_path}/store"
    one, two = tmp_path / "one/state", tmp_path / "two/state"
    engine = [sys.executable, str(_ENGINE), str(_PORT), "4", str(tmp_path / "weights.bin")]
    taken = ("--port", str(_PORT), "--canary", "/sum", "--", *engine)
    await zerowake("snapshot", "create", "tiny", "--state", str(one), "--to", store, *taken)
    (public,) = [line.split()[-1] for line in (await zerowake("key", "list", "--state", str(one))).splitlines() if "signs" in line]
    await zerowake("key", "trust", public, "--state", str(two))

    certificate, key = Authority("zerowake test authority").issue("scaler").write(tmp_path, "tls")
    keda = {"listen": f"127.0.0.1:{free_port()}", "tls": {"certificate": str(certificate), "key": str(key)}}
    quick = {"snapshot": "tiny", "cooldown_seconds": 0.5, "polling_seconds": 0.2}
    yearly = {"type": "cron", "timezone": "UTC", "start": "0 0 29 2 *", "end": "1 0 29 2 *", "desired": 1}
    tiny = quick | {"stage": "disk", "command": engine, "port": _PORT}
    idle = {"command": ["sleep", "3600"], "port": _PORT, "sources": [yearly]}
    with tempfile.TemporaryDirectory() as short, served(Path(short), reserve=64 * MIB, arena=32 * MIB) as gpumem:
        environment = {**os.environ, "GPUMEM_SOCKET": str(gpumem.socket)}
        async with (
            machine(one, {"tiny": tiny, "idle": idle}, environment, keda=keda) as first,
            machine(two, {"tiny": quick}, store=store) as second,
            prometheus_server(tmp_path, *first.pages, *second.pages, every="1s") as prometheus,
            aiohttp.ClientSession() as session,
        ):
            broken = zerowake("snapshot", "create", "broken", "--state", str(one), "--port", str(_PORT), "--", "/bin/false", code=1)
            again = zerowake("snapshot", "create", "again", "--state", str(one), *taken)
            await asyncio.gather(broken, again, _from_zero(first), _from_zero(second))
            assert await first.ask("nobody", "/") == 404
            catalog = Catalog(one)
            chunk = catalog.chunks.path(catalog.get("default", "tiny").chunks[0].hash)
            chunk.write_bytes(bytes(chunk.stat().st_size))
            await first.until("agent", 'zerowake_node_snapshots{state="corrupt"}', lambda value: value == 1)
            assert await first.ask("tiny", "/sum") == 200
            await first.until("agent", 'zerowake_restores_total{model="tiny",origin="cold"}', lambda value: value == 1)
            # Of one scale-up or staging alone no rate can be told, so they go on until Prometheus has seen enough of them.
            left: list[str] = []
            try:
                async with asyncio.timeout(120):
                    while set(left := await _unanswered(session, prometheus.url)) != WITHOUT_DATA.keys():
                        await asyncio.gather(_from_zero(first), _from_zero(second))
                        await _staged_again(two)
            except TimeoutError:
                raise AssertionError(f"no data, or data where none was thought to be: {left}") from None
