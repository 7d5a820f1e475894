"""The parts that both programs are made of, joined here and nowhere else, in the order in which a request comes to them.

gateway     takes the request, finds its model, and asks
dispatcher  for a place on a replica; if there is none, the request is held, and stands in
ledger      whose edge, from no demand to some, opens an activation and wakes
planner     which decides what the nodes do about it, beside whoever scales (KEDA, or our autoscaler); the
executor    asks the agents for it, whose streams tell
nodes       of the replica that is ready, and they
readiness   which joins it with what the replica's pod says, and tells the dispatcher, which hands it to the request: the exchange begins

The ledger's edges also feed the forecast, which nothing of this waits for. By its word bytes move ahead of need (fleet/staging_ahead.py).
Where a replica sleeps in its pod, the dispatcher has the waker wake it instead, and nodes and readiness tell of it as of a new one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import REGISTRY

from scaler.books.ledger import Ledger
from scaler.fleet.executor import Executor, ReplicaMaker
from scaler.fleet.nodes import Dial, Nodes
from scaler.fleet.planner import Planner
from scaler.fleet.readiness import Readiness
from scaler.fleet.staging_ahead import StagingAhead
from scaler.fleet.waker import Waker
from scaler.gateway.dispatcher import Dispatcher
from scaler.gateway.gateway import Gateway
from scaler.gateway.places import Places
from scaler.plan.declared import DeclaredModels
from scaler.plan.world import Replica
from scaler.plan.worth import OBJECTIVES
from scaler.programs.forecasting import Forecasting
from scaler.view.activations import record_activation
from scaler.view.metrics import AgentsCollector, AheadCollector, ForecastCollector, LedgerCollector, StagingCollector
from zerowake_shared.clock import SYSTEM_CHANCE, SYSTEM_CLOCK, Clock


@dataclass(frozen=True, slots=True)
class Parts:
    """One scaler, joined but not started."""

    ledger: Ledger
    dispatcher: Dispatcher
    gateway: Gateway
    readiness: Readiness
    nodes: Nodes
    planner: Planner
    waker: Waker
    forecasting: Forecasting
    staging_ahead: StagingAhead


def wire(
    ledger: Ledger,
    models: DeclaredModels,
    *,
    maker: Callable[[Nodes, Dispatcher], ReplicaMaker] | None = None,
    places: Places | None = None,
    admits: Callable[[Replica], bool] = lambda _: True,
    dial: Dial | None = None,
    forecast_file: Path | None = None,
    clock: Clock = SYSTEM_CLOCK,
    chance: random.Random = SYSTEM_CHANCE,
    objective: str = "mean",
    memory_quotas: Mapping[str, int] | None = None,
) -> Parts:
    """Joins the parts around a ledger, whose activations are logged and counted when they end.

    models: what their owners wish, kept up to date in place. maker: makes and ends replicas; None: Kubernetes does. places: those of
    replicas that are this gateway's; None: all. admits: whether a replica may be sent requests. dial: how agents are reached; None: by
    gRPC. forecast_file: as in Forecasting. clock: the one that the ledger's activations have.
    objective: of what moves ahead of need, by its name in OBJECTIVES. memory_quotas: as a World's.
    """
    ledger.activations.on_end(record_activation)
    dispatcher = Dispatcher(ledger, places)
    gateway = Gateway(ledger, dispatcher, clock)
    readiness = Readiness(dispatcher)
    nodes = Nodes(readiness, ledger.activations, admits, clock, chance, dial)
    dispatcher.suspects.on_unreachable(nodes.doubt)
    executor = Executor(nodes, maker(nodes, dispatcher) if maker else None, ledger.report_failure, clock, dispatcher.start_failed)
    planner = Planner(ledger, nodes, models, executor, dispatcher.in_flight, clock, memory_quotas)
    forecasting = Forecasting(ledger, forecast_file, clock)
    staging_ahead = StagingAhead(planner, nodes, ledger, forecasting.forecast, clock, OBJECTIVES[objective])
    forecasting.on_judged(staging_ahead.look_soon)
    return Parts(ledger, dispatcher, gateway, readiness, nodes, planner, Waker(ledger, nodes, dispatcher), forecasting, staging_ahead)


def show(parts: Parts) -> None:
    """What they know anyway is among this process's metrics from now on."""
    REGISTRY.register(LedgerCollector(parts.ledger))
    REGISTRY.register(ForecastCollector(parts.forecasting.forecast))
    REGISTRY.register(AheadCollector(parts.staging_ahead))
    REGISTRY.register(AgentsCollector(parts.nodes))
    REGISTRY.register(StagingCollector(parts.planner))
