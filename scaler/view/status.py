"""What `zerowake status`, `zerowake plan` and `zerowake trace` ask: JSON on a UNIX socket in the state folder, readable by root alone.

A scaler on Kubernetes may write nowhere. Its socket has a name that is no file (abstract), and answers those alone who are root, or who it
is itself. It is reached in its pod: `kubectl exec`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
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
from scaler.view.plan import PlanView
from scaler.view.reading import StateReader
from scaler.view.state import SCALER_SOCKET, socket_of
from scaler.view.waterfall import Waterfalls
from zerowake_shared.listening import make_way

log = logging.getLogger(__name__)

_SHOWN_ACTIVATIONS = 10


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
    plan: PlanView,
    state_reader: StateReader,
) -> AsyncIterator[None]:
    """Serves the state, what `zerowake status --json` shows (GET /), and what `zerowake plan` and `zerowake trace` ask for, until the block
    ends. The state folder is ours. Raises: CannotListen."""

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
    app.add_routes([web.get("/", show), *plan.routes, *Waterfalls(activations).routes, *state_reader.routes])
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(path)).start()
        path.chmod(stat.S_IRUSR | stat.S_IWUSR)
        yield
    finally:
        await runner.cleanup()
        path.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def serve_in_pod(routes: Iterable[web.RouteDef], name: str = SCALER_SOCKET) -> AsyncIterator[None]:
    """Serves what these commands ask for until the block ends; of several scalers in one network namespace the first does."""

    @web.middleware
    async def only_ours(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        connection = request.get_extra_info("socket")
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        if user not in (0, os.geteuid()):
            raise web.HTTPForbidden(text="this socket answers its own user and root")
        return await handler(request)

    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(name)
        except OSError as error:
            log.warning("`zerowake status`, `zerowake plan` and `zerowake trace` are answered by another scaler here: %s", error)
            yield
            return
        app = web.Application(middlewares=[only_ours])
        app.add_routes(routes)
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            yield
        finally:
            await runner.cleanup()


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
                "weights_rung": each.weights_rung.name.lower() if each.weights_rung else None,
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
