"""`zerowake up`: the whole system on one machine, as design.md draws it.

    client → gateway → ledger → external scaler ─gRPC→ autoscaler → deployment ─gRPC→ restore agent
            sources ─────↑└───→ planner ─gRPC────────────────────────────────────→      ↑

Nothing is special-cased for the single machine but two parts that Kubernetes would bring: the autoscaler, a gRPC client of the same scaler
that KEDA asks, and the deployment. The restore agent is a process of its own, so that its disk, CRIU and copying never stand in the way of
a request, and so that it can die: it is started again, and held requests go on waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys

from prometheus_client import REGISTRY

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.fleet.nodes import Nodes
from scaler.gateway.gateway import Gateway
from scaler.keda.external_scaler import serve_external_scaler
from scaler.local.autoscaler import Autoscaler, dial
from scaler.local.config import Config
from scaler.local.deployment import Deployment
from scaler.local.look import Look
from scaler.local.pins import take_back
from scaler.local.replica_maker import LocalReplicas
from scaler.local.stores import Stores
from scaler.page.site import serve_shown
from scaler.plan.declared import DeclaredModels
from scaler.programs.stopping import stopped_by, unless
from scaler.programs.tracing import traced
from scaler.programs.wiring import show, wire
from scaler.sources.engine_metrics import engines_of
from scaler.sources.push import Pushes, TokenFile
from scaler.sources.watch import Sources
from scaler.view.metrics import SourcesCollector
from scaler.view.plan import PlanView
from scaler.view.reading import StateReader
from scaler.view.status import serve_status
from zerowake_shared import background
from zerowake_shared.address import Address
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import SYSTEM_CLOCK
from zerowake_shared.listening import check_all_free, check_threads
from zerowake_shared.state_folder import owned, store_holder
from zerowake_shared.tls import TlsFiles

log = logging.getLogger(__name__)

_AGENT_FIRST_RETRY_SECONDS, _AGENT_LAST_RETRY_SECONDS = 0.1, 10.0
_AGENT_STOP_SECONDS = 15.0
_AGENT_LOOK_SECONDS = 0.2
_SOCKETS = ("status.sock", "scaler.sock", "agent.sock")


class AgentFailed(Exception):
    """The restore agent could not start; it has said itself why."""


async def up(config: Config) -> None:
    """Runs until SIGTERM or SIGINT, then drains; a second one ends it at once. What may keep it from running is looked at first.

    Raises:
        FolderInUse, UnusableFolder: the state folder is another's, or cannot be written.
        CannotListen, BadCertificate: an address is taken, or a certificate is of no use.
        AgentFailed, OSError.
    """
    with owned(config.state):
        check_threads("zerowake up")
        # The agent of a `zerowake up` that was killed has its address until it has ended, which is waited for before there is another one.
        earlier = store_holder(config.state)
        check_all_free((who, where) for who, where in config.addresses if not (earlier and where == config.agent_metrics))
        check_all_free(("a program of `zerowake up`", f"unix:{config.state / name}") for name in _SOCKETS)
        await _up(config)


async def _up(config: Config) -> None:
    stop, at_once = stopped_by(signal.SIGTERM, signal.SIGINT)

    activations = Activations()
    ledger = Ledger(activations=activations)
    for name, section in config.models.items():
        ledger.declare(name, section.limits, section.names)
    looks = {name: Look() for name, section in config.models.items() if config.store and section.snapshot}
    models = DeclaredModels({name: section.model(name) for name, section in config.models.items()})
    parts = wire(
        ledger,
        models,
        maker=lambda nodes, dispatcher: LocalReplicas(config.models, nodes, dispatcher, activations, looks),
        forecast_file=config.state / "forecast",
        objective=config.objective,
    )
    dispatcher, gateway, nodes, planner = parts.dispatcher, parts.gateway, parts.nodes, parts.planner
    deployments = {name: Deployment(name, planner, section.min_replicas) for name, section in config.models.items()}
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(dispatcher.close)
        served = asyncio.Event()
        nodes.on_change(lambda node: served.set() if node.synced else None)
        await stack.enter_async_context(background.beside(_keep_agent(config, served), "restore agent"))
        agent = f"unix:{config.state / 'agent.sock'}"
        await stack.enter_async_context(nodes.follow(agent))
        named = {section.snapshot_name for section in config.models.values() if section.snapshot_name}
        await stack.enter_async_context(background.beside(take_back(nodes, agent, named), "pins of models that are gone"))
        if config.store:
            stores = Stores(config.store, config.models, nodes, agent, looks)
            await stack.enter_async_context(background.beside(stores.keep(), "snapshots and their store"))
        stack.push_async_callback(planner.close)
        stack.push_async_callback(parts.waker.close)
        await stack.enter_async_context(background.kept_beside(parts.forecasting.run, "forecast", log))
        await stack.enter_async_context(background.kept_beside(parts.staging_ahead.run, "staging ahead", log))
        sources = await stack.enter_async_context(Sources(ledger, engines=functools.partial(engines_of, dispatcher)))
        for name, section in config.models.items():
            sources.declare(name, section.sources)
        serve_scaler = functools.partial(serve_external_scaler, ledger, activations=activations, on_trigger=planner.triggered)
        scaler = await stack.enter_async_context(serve_scaler(address=f"unix:{config.state / 'scaler.sock'}"))
        if config.keda:
            tls = TlsFiles(**config.keda.tls.model_dump()) if config.keda.tls else None
            await stack.enter_async_context(serve_scaler(address=config.keda.listen, tls=tls))
        autoscaler = await stack.enter_async_context(Autoscaler(await stack.enter_async_context(dial(scaler))))
        for name, model in config.models.items():
            autoscaler.add(name, model.trigger(name), model.rules, deployments[name])
        plan = PlanView(planner, models, parts.forecasting.explained, lambda: _not_ready(nodes, gateway), parts.staging_ahead.weigh)
        reader = StateReader(
            socket.gethostname(),
            ledger=ledger,
            dispatcher=dispatcher,
            nodes=nodes,
            planner=planner,
            models=models,
            next_likely=parts.forecasting.next_likely,
            missing=lambda: _not_ready(nodes, gateway),
            scale=lambda name: (deployments[name].replicas(), config.models[name].max_replicas),
            sources=sources.states_of,
        )
        await stack.enter_async_context(background.beside(reader.run(), "rates of requests"))
        await stack.enter_async_context(
            serve_status(config.state, config.models, deployments, ledger, dispatcher, nodes, planner, activations, sources, plan, reader)
        )
        REGISTRY.register(SourcesCollector(sources))
        show(parts)
        if config.metrics:
            routes = [Pushes(sources, TokenFile(config.push.token_file)).route] if config.push else []
            where, ready = Address.to_listen(config.metrics), lambda: _not_ready(nodes, gateway)
            await stack.enter_async_context(serve_shown(*where, ready, reader.read, page=config.page, routes=routes))
        await stack.enter_async_context(traced(activations, gateway))
        bound = await stack.enter_async_context(gateway.serve(*Address.to_listen(config.listen)))
        log.info("gateway serves %s on %s", ", ".join(sorted(config.models)), Address(*bound))
        await stop.wait()
        log.info("stopping: requests that wait have %.0f s, answers are finished; a second signal cuts them", config.drain_seconds)
        await unless(at_once, gateway.drain(config.drain_seconds))


async def _keep_agent(config: Config, served: asyncio.Event) -> None:
    """Keeps a restore agent running in a process of its own until cancelled. served: it is connected, or was once.

    Raises:
        AgentFailed: it could not start at all, so another try would end alike.
    """
    await _earlier_agent_ended(config)
    command = [sys.executable, "-m", "scaler.programs.cli", "agent", "--state", str(config.state), "--parent", str(os.getpid())]
    if config.agent_metrics:
        command += ["--metrics", config.agent_metrics]
    backoff = Backoff(_AGENT_FIRST_RETRY_SECONDS, _AGENT_LAST_RETRY_SECONDS)
    while True:
        began = SYSTEM_CLOCK.now()
        try:
            # A process group of its own: Ctrl-C reaches us, and the agent is stopped when requests have drained.
            process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            if not served.is_set():
                raise AgentFailed(f"the restore agent could not start: {error}") from error
            pause = backoff.next()  # the machine has too little of something, which is no reason to leave those that wait
            log.warning("the restore agent cannot be started again (%s); next try in %.1f s", error, pause)
            await asyncio.sleep(pause)
            continue
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _AGENT_STOP_SECONDS)
            except TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
            raise
        if code > 0 and not served.is_set():
            raise AgentFailed(f"the restore agent could not start ({_said(code)}), for the reason that it has given above")
        if SYSTEM_CLOCK.now() - began > _AGENT_LAST_RETRY_SECONDS:
            backoff.reset()
        pause = backoff.next()
        log.warning("the restore agent ended (%s); its replicas are gone, it starts again in %.1f s", _said(code), pause)
        await asyncio.sleep(pause)


async def _earlier_agent_ended(config: Config) -> None:
    """The folder is ours, so an agent that still has the store is that of a `zerowake up` that was killed: it ends by itself."""
    deadline = SYSTEM_CLOCK.now() + _AGENT_STOP_SECONDS
    while has := store_holder(config.state):
        if SYSTEM_CLOCK.now() > deadline:
            raise AgentFailed(f"{has}, the agent of an earlier `zerowake up`, does not end and still has {config.state}; kill it")
        log.info("waiting for %s, the agent of an earlier `zerowake up`, to end", has)
        await asyncio.sleep(_AGENT_LOOK_SECONDS)


def _not_ready(nodes: Nodes, gateway: Gateway) -> str:
    if gateway.draining:
        return "the gateway is draining"
    return "" if any(node.synced for node in nodes) else "no restore agent is connected"


def _said(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
