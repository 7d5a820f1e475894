"""What `zerowake status` shows: one JSON page on a UNIX socket in the state folder, readable by root alone."""

from __future__ import annotations

import contextlib
import dataclasses
import stat
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from scaler.books.activation import Activations
from scaler.books.demand import DemandReader
from scaler.fleet.nodes import Nodes
from scaler.fleet.planner import Planner
from scaler.gateway.dispatcher import Dispatcher
from scaler.local.config import ModelSection
from scaler.local.deployment import Deployment
from scaler.plan.rungs import Rung
from scaler.plan.world import Node
from scaler.sources.watch import Sources, SourceState
from zerowake_shared.listening import make_way

_SHOWN_ACTIVATIONS = 10


def socket_of(state: Path) -> Path:
    return state / "status.sock"


@contextlib.asynccontextmanager
async def serve_status(
    state: Path,
    models: Mapping[str, ModelSection],
    deployments: Mapping[str, Deployment],
    ledger: DemandReader,
    dispatcher: Dispatcher,
    nodes: Nodes,
    planner: Planner,
    activations: Activations,
    sources: Sources,
) -> AsyncIterator[None]:
    """Serves GET / until the block ends. The state folder is ours. Raises: CannotListen."""

    async def show(_: web.Request) -> web.Response:
        asked_elsewhere = sources.states()
        return web.json_response(
            {
                "models": [
                    _model(name, models[name], deployments[name], ledger, nodes, planner)
                    | {"sources": [_source(state) for state in asked_elsewhere.get(name, [])]}
                    for name in sorted(models)
                ],
                "nodes": [_node(node) for node in nodes],
                "replicas": [
                    {
                        "id": replica.id,
                        "model": replica.model,
                        "node": node.name,
                        "origin": replica.origin,
                        "in_flight": dispatcher.in_flight(replica.id),
                        "detail": replica.detail,
                    }
                    for node in nodes
                    for replica in node.replicas.values()
                ],
                "activations": [
                    {
                        "id": each.id,
                        "model": each.model,
                        "began": each.began,
                        "outcome": each.outcome,
                        "reason": each.reason,
                        "origin": each.origin,
                        "seconds": each.total,
                        "phases": dict(each.phases),
                    }
                    for each in activations.recent(_SHOWN_ACTIVATIONS)
                ],
            }
        )

    path = socket_of(state)
    make_way(path, "`zerowake status`")
    app = web.Application()
    app.add_routes([web.get("/", show)])
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(path)).start()
        path.chmod(stat.S_IRUSR | stat.S_IWUSR)
        yield
    finally:
        await runner.cleanup()
        path.unlink(missing_ok=True)


def _node(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "memory_free_bytes": node.memory_free_bytes,
        "memory_total_bytes": node.memory_total_bytes,
        "staged_bytes": node.staged_bytes,
        "staged_limit_bytes": node.staged_limit_bytes,
        "gpus": [dataclasses.asdict(gpu) for gpu in node.gpus],
        "rates": dataclasses.asdict(node.rates),
        "sources": [dataclasses.asdict(source) for source in node.sources],
        "transfers": [
            {
                "snapshot": str(each.snapshot),
                "rung": each.rung.name.lower(),
                "done_bytes": each.done_bytes,
                "total_bytes": each.total_bytes,
            }
            for each in node.transfers
        ],
    }


def _source(state: SourceState) -> dict[str, Any]:
    counts = state.reading
    return {
        "name": state.name,
        "of": state.says,
        "pending": counts.pending if counts else None,
        "replicas": counts.replicas if counts else None,
        "age_seconds": state.age_seconds,
        "up": state.up,
        "fault": state.fault,
    }


def _model(
    name: str, section: ModelSection, deployment: Deployment, ledger: DemandReader, nodes: Nodes, planner: Planner
) -> dict[str, Any]:
    demand = ledger.demand(name)
    rungs, pinned, why, refused = [], [], [], []
    if snapshot := section.snapshot_name:
        for node in nodes:
            residency = node.residencies.get(snapshot)
            rungs.append((residency.rung if residency else Rung.ABSENT).name.lower())
            pinned.append((residency.pinned if residency else Rung.ABSENT).name.lower())
            why += [residency.unusable] if residency and residency.unusable else []
            said = planner.why_no_higher(node, residency) if residency else planner.why_not_fetched(node, snapshot)
            refused += [said] if said else []
    return {
        "name": name,
        "snapshot": section.snapshot,
        "rung": ", ".join(rungs),
        "pinned": ", ".join(pinned),
        "unusable": "; ".join(why),
        "refused": "; ".join(refused),
        "wanted": deployment.replicas(),
        "ready": demand.replicas,
        "held": demand.held,
        "in_flight": demand.in_flight,
        "failure": ledger.failure(name),
    }
