"""Ten agents as processes of this machine, forty snapshots of the test server, and clients of ServeGen sixty times as fast as they were.

The scaler is the product's own, joined as `zerowake up` joins it, and follows ten agents instead of one; each has so much memory for images
that one node holds one large image, or two or three small ones. A scale-up has found its image if that stood in memory, as its first
request came, on the node that made the replica. In the same run, with the same memory and the same requests:

    zerowake     as it is, with a forecast that has seen the week before
    lru          the image that was used longest ago leaves first (tests/bench/lru_agent.py), and nothing is fetched ahead
    keep-alive   the same, and an image leaves ten minutes after its last use

What the planner does each minute it does each second here. The simulator is asked about the very same scale-ups.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np

from restore_agent.snapshots.catalog import Catalog
from scaler.books.activation import Activation, Activations
from scaler.books.ledger import Ledger
from scaler.books.snapshot_name import SnapshotName
from scaler.fleet import staging_ahead
from scaler.fleet.nodes import Nodes
from scaler.fleet.staging_ahead import StagingAhead
from scaler.forecast.forecast import STATEMENT_SECONDS, Forecast
from scaler.forecast.state_file import load as load_forecast
from scaler.forecast.state_file import save
from scaler.gateway.dispatcher import Dispatcher
from scaler.keda.external_scaler import serve_external_scaler
from scaler.local.autoscaler import Autoscaler, dial
from scaler.local.config import Config, ModelSection
from scaler.local.deployment import Deployment
from scaler.local.replica_maker import LocalReplicas
from scaler.plan import ahead as plan_ahead
from scaler.plan.ahead import LEFT_SECONDS, WITHIN_SECONDS
from scaler.plan.declared import DeclaredModels
from scaler.plan.rungs import Rung
from scaler.plan.worth import Objective
from scaler.programs.wiring import wire
from scaler.simulate.episodes import Episodes
from scaler.simulate.policies import KeepAlive, Lru, Policy, Zerowake
from scaler.simulate.rungs import Rungs
from scaler.simulate.scenario import load
from scaler.simulate.simulation import Cluster, Simulation
from scaler.simulate.trace import Trace, read_servegen
from tests.bench.figures import Figure
from tests.worlds.agent import Agent, engine, running
from zerowake_shared.background import beside

NODES, MODELS = 10, 40
FASTER = 60.0
WEEK = 7 * 86_400.0  # seconds of the trace that the forecast has seen
MINUTES = float(os.environ.get("MINUTES", "10"))  # of the clock
MEBIBYTES = (1,) * 24 + (12,) * 12 + (28,) * 4  # of images of 25, 47 and 81 MB: 60 %, 30 % and 10 % of the models, as in servegen.yaml
MEMORY = 84 << 20  # bytes of each node
COOLDOWN, KEPT_ALIVE = 60.0 / FASTER, 600.0 / FASTER
_LEFT_SECONDS, _WITHIN_SECONDS, _GATHER_SECONDS = LEFT_SECONDS, WITHIN_SECONDS, staging_ahead._GATHER_SECONDS
_ANSWER_SECONDS, _POLLING_SECONDS = 0.05, 0.5
_SECTION = {"stage": "disk", "cooldown_seconds": COOLDOWN, "polling_seconds": _POLLING_SECONDS, "stabilisation_seconds": 0.0}
_SIMPLE = ("lru", "keep-alive")
_SERVEGEN = Path(__file__).with_name("servegen.yaml")


@dataclass
class Seen:
    """Of one policy: of each scale-up whether its image stood in memory where the replica was made, and its seconds; what failed."""

    found: list[bool] = field(default_factory=list)
    episodes: list[list[float]] = field(default_factory=list)  # model, and seconds since the minutes began: first request, end of the last
    elsewhere: int = 0  # it stood in memory of another node alone
    seconds: list[float] = field(default_factory=list)
    fetched_bytes: int = 0  # ahead of need; of these, wasted; hits: scale-ups that found them
    wasted_bytes: int = 0
    hits: int = 0
    failed: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        return statistics.fmean(self.found)

    def watch(self, ledger: Ledger, nodes: Callable[[], Nodes]) -> None:
        """From now on."""
        began, latest, stood = time.monotonic(), dict[str, list[float]](), dict[str, set[str]]()

        def asked(model: str) -> None:
            latest[model] = [float(model[1:]), time.monotonic() - began, math.inf]
            self.episodes.append(latest[model])
            name = SnapshotName.parse(model)
            stood[model] = {node.address for node in nodes() if name in node.residencies and node.residencies[name].rung >= Rung.MEMORY}

        def quiet(model: str) -> None:
            if model in latest:
                latest[model][2] = time.monotonic() - began

        def ended(activation: Activation) -> None:
            if activation.outcome != "served":
                self.failed.append(f"{activation.model}: {activation.outcome}: {activation.reason}")
                return
            made_on = {node.address for node in nodes() for replica in node.replicas.values() if replica.model == activation.model}
            self.found.append(bool(made_on & stood[activation.model]))
            self.elsewhere += bool(stood[activation.model]) and not self.found[-1]
            self.seconds.append(activation.total)

        ledger.on_quiet(quiet)
        ledger.on_first_demand(asked)
        ledger.activations.on_end(ended)


def requests() -> Trace:
    """Times in seconds of the clock, from the week's beginning on."""
    given = load(_SERVEGEN).trace.servegen
    assert given
    found = read_servegen(given.folder, MODELS, given.windows, given.requests, given.most_a_second, 0.0, np.random.default_rng(1))
    names = [f"m{index}" for index in range(MODELS)]
    until = WEEK + MINUTES * 60 * FASTER
    kept = found.at < until
    return Trace(names, found.at[kept] / FASTER, found.model[kept], found.tokens[kept], until / FASTER)


async def capture(state: Path) -> dict[str, int]:
    """Forty snapshots; bytes of each one's image."""
    state.mkdir()
    mapped = state.parent / "mapped"
    mapped.write_bytes(os.urandom(1 << 20))
    async with running(state) as agent:
        for index, mebibytes in enumerate(MEBIBYTES):
            await agent.snapshot(f"m{index}", engine(mapped, mebibytes, timeout=120.0))
    catalog = Catalog(state)
    return {f"m{index}": catalog.get("default", f"m{index}").manifest.image_bytes for index in range(MODELS)}


def node_folders(captured: Path, folder: Path) -> list[Path]:
    """A state folder for each node, with all snapshots; files that nothing writes into are links."""
    folders = []
    for index in range(NODES):
        state = folder / f"node-{index}"
        ignored = shutil.ignore_patterns("agent.sock", "memory", "lock", "owner.lock", "tmp", "hugepages-enabled")
        shutil.copytree(captured, state, symlinks=True, ignore=ignored, copy_function=os.link)
        folders.append(state)
    return folders


def forecast_of(trace: Trace, now: float, file: Path) -> None:
    """What a scaler that began a week ago would know, when the week is over now."""
    forecast, week = Forecast(), WEEK / FASTER
    for name in trace.models:
        forecast.declare(name, now - week)
    busy_until, judged = [0.0] * MODELS, 0.0
    for at, model in zip(trace.at.tolist(), trace.model.tolist(), strict=True):
        if at >= week:
            break
        while judged + STATEMENT_SECONDS <= at:
            judged += STATEMENT_SECONDS
            forecast.judge(now - week + judged)
        if at > busy_until[model]:
            forecast.began(trace.models[model], now - week + at)
            forecast.ended(trace.models[model], now - week + at + _ANSWER_SECONDS)
        busy_until[model] = at + _ANSWER_SECONDS
    forecast.judge(now)
    save(file, forecast.state())


@contextlib.asynccontextmanager
async def scaler(folder: Path, agents: list[Agent], forecast: Path | None, seen: Seen) -> AsyncIterator[tuple[int, Nodes]]:
    """Its gateway's port."""
    activations = Activations()
    ledger = Ledger(activations=activations)
    config = Config(models={f"m{index}": ModelSection.model_validate({**_SECTION, "snapshot": f"m{index}"}) for index in range(MODELS)})
    for name, each in config.models.items():
        ledger.declare(name, each.limits, each.names)

    def maker(nodes: Nodes, dispatcher: Dispatcher) -> LocalReplicas:
        return LocalReplicas(config.models, nodes, dispatcher, activations)

    seen.watch(ledger, lambda: parts.nodes)  # before the planner hears of a request, and moves anything
    declared = DeclaredModels({name: each.model(name) for name, each in config.models.items()})
    parts = wire(ledger, declared, maker=maker, forecast_file=forecast)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(parts.dispatcher.close)
        for agent in agents:
            await stack.enter_async_context(parts.nodes.follow(f"unix:{agent.state / 'agent.sock'}"))
        stack.push_async_callback(parts.planner.close)
        stack.push_async_callback(parts.waker.close)
        if forecast:
            await stack.enter_async_context(beside(parts.forecasting.run(), "forecast"))
            await stack.enter_async_context(beside(parts.staging_ahead.run(), "snapshots ahead of need"))
            await stack.enter_async_context(beside(look(parts.staging_ahead, seen), "minutes"))
        deployments = {name: Deployment(name, parts.planner, each.min_replicas) for name, each in config.models.items()}
        serve = functools.partial(serve_external_scaler, ledger, activations=activations, on_trigger=parts.planner.triggered)
        address = await stack.enter_async_context(serve(address=f"unix:{folder / 'scaler.sock'}"))
        autoscaler = await stack.enter_async_context(Autoscaler(await stack.enter_async_context(dial(address))))
        for name, each in config.models.items():
            autoscaler.add(name, each.trigger(name), each.rules, deployments[name])
        _, port = await stack.enter_async_context(parts.gateway.serve("127.0.0.1", 0))
        async with asyncio.timeout(60):
            while sum(node.synced for node in parts.nodes) < NODES:
                await asyncio.sleep(0.1)
        yield port, parts.nodes


async def look(ahead: StagingAhead, seen: Seen) -> None:
    """What is done each minute is done each second here."""
    while True:
        await asyncio.sleep(60 / FASTER)
        ahead.look_soon()
        seen.fetched_bytes, seen.wasted_bytes, seen.hits = ahead.fetched_bytes, ahead.wasted_bytes, ahead.hits


def make_faster() -> None:
    """What the product's planner counts in seconds, as it counts them at this pace."""
    for module in (plan_ahead, staging_ahead):
        module.LEFT_SECONDS = _LEFT_SECONDS / FASTER  # type: ignore[attr-defined]
        module.WITHIN_SECONDS = _WITHIN_SECONDS / FASTER  # type: ignore[attr-defined]
    staging_ahead._GATHER_SECONDS = _GATHER_SECONDS / FASTER


async def ask_all(trace: Trace, port: int, seen: Seen) -> None:
    """Each request at its moment, whatever became of those before."""
    begin = time.monotonic()
    now = np.searchsorted(trace.at, WEEK / FASTER)

    async def ask(client: aiohttp.ClientSession, model: str) -> None:
        try:
            async with client.get(f"http://127.0.0.1:{port}/models/{model}/count") as response:
                if response.status != 200:
                    seen.failed.append(f"{model}: {response.status} {(await response.text())[:200]}")
        except (aiohttp.ClientError, TimeoutError) as error:
            seen.failed.append(f"{model}: {error!r}")

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client, asyncio.TaskGroup() as group:
        for at, model in zip(trace.at[now:].tolist(), trace.model[now:].tolist(), strict=True):
            await asyncio.sleep(max(0.0, begin + at - WEEK / FASTER - time.monotonic()))
            group.create_task(ask(client, trace.models[model]))


async def keep_alive(agents: list[Agent], nodes: Nodes) -> None:
    """Images leave so long after the last replica of theirs has ended."""
    last: dict[tuple[str, str], float] = {}
    by_address = {f"unix:{agent.state / 'agent.sock'}": agent for agent in agents}
    while True:
        await asyncio.sleep(0.5)
        now = time.monotonic()
        for node in nodes:
            lives = {replica.model for replica in node.replicas.values()}
            for name, residency in node.residencies.items():
                key = node.address, name.name
                if name.name in lives or residency.rung < Rung.MEMORY:
                    last[key] = now
                elif now - last.setdefault(key, now) > KEPT_ALIVE:
                    await by_address[node.address].unstage(name.name)


async def run(name: str, captured: Path, trace: Trace, forecast: Path | None) -> Seen:
    """One policy, from empty memories on."""
    seen = Seen()
    program = "tests.bench.lru_agent" if name in _SIMPLE else "scaler.programs.cli"
    with tempfile.TemporaryDirectory(dir=captured.parent) as made:
        async with contextlib.AsyncExitStack() as stack:
            agents = [
                await stack.enter_async_context(running(state, "--memory", str(MEMORY), "--node", state.name, program=program))
                for state in node_folders(captured, Path(made))
            ]
            port, nodes = await stack.enter_async_context(scaler(Path(made), agents, forecast, seen))
            keeping = keep_alive(agents, nodes) if name == "keep-alive" else asyncio.sleep(math.inf)
            await stack.enter_async_context(beside(keeping, name))
            await ask_all(trace, port, seen)
    return seen


def predicted(name: str, seen: Seen, sizes: Sequence[float], forecast: Path, start: float) -> float:
    """The simulator's word on the same scale-ups: the share that finds its image in memory. A running engine's image stays there, as agents
    have it.
    """
    model, begin, quiet = np.array(sorted(seen.episodes, key=lambda each: each[1])).T
    quiet = np.where(np.isinf(quiet), begin + _ANSWER_SECONDS, quiet)
    following = np.array([min(begin[(model == each) & (begin > at)], default=np.inf) for each, at in zip(model, begin, strict=True)])
    found = Episodes(model.astype(int), begin, quiet, np.minimum(quiet + COOLDOWN, following), following)
    rungs = Rungs(disk=1e9, peer=1e9, store=1e9, pinned=1e12, overhead=0.05, fill_seconds=0.01, parked_overhead=0.05)
    saved = np.array([rungs.seconds(rungs.disk, size) - rungs.seconds(rungs.host, size) for size in sizes])
    names, policy = [f"m{index}" for index in range(MODELS)], Policy(np.array(sizes), saved)
    if name == "zerowake":
        state = load_forecast(forecast)
        assert state
        policy = Zerowake(names, policy.sizes, saved, Forecast.restored(state, start), start, Objective())
    elif name == "lru":
        policy = Lru(policy.sizes, saved)
    else:
        policy = KeepAlive(policy.sizes, saved)
        policy.seconds = KEPT_ALIVE
    policy.keeps_running, policy.on_gpus = True, False
    simulated = Simulation(Cluster(NODES, 1, 1e15, float(MEMORY), 0.0, False), rungs, list(sizes), found, policy, 1).run()
    return float(np.mean(np.array(simulated.rung) == rungs.host))


def unavailable() -> str:
    given = load(_SERVEGEN).trace.servegen
    if os.geteuid() or not given or not given.folder.exists():
        return f"it needs root, and ServeGen's clients in {given.folder if given else _SERVEGEN}"
    return ""


async def main() -> list[Figure]:
    trace, figures = requests(), []
    make_faster()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        captured, forecast = Path(made) / "state", Path(made) / "forecast"
        sizes = list((await capture(captured)).values())
        for name in ("zerowake", *_SIMPLE):
            start = time.time()
            forecast_of(trace, start, forecast)
            kept = Path(shutil.copy(forecast, Path(made) / "used")) if name == "zerowake" else None
            seen = await run(name, captured, trace, kept)
            said = predicted(name, seen, sizes, forecast, start)
            p50, p99 = np.percentile(seen.seconds, [50, 99])
            detail = f"of {len(seen.found)} scale-ups; {seen.elsewhere} stood on another node; {len(seen.failed)} requests failed"
            detail += f"; {p50:.3f} s, p99 {p99:.3f}"
            figures.append(Figure(f"{name}: found in memory", 100 * seen.share, "%", detail=detail))
            if name == "zerowake":
                wasted = f"{seen.wasted_bytes / 1e6:.0f} MB left unused, {seen.hits} scale-ups found theirs"
                figures.append(Figure("zerowake: fetched ahead", seen.fetched_bytes / 1e6, "MB", detail=wasted))
            figures.append(Figure(f"{name}: as the simulator says", 100 * said, "%", detail=f"{100 * (said - seen.share):+.1f}"))
    return figures


if __name__ == "__main__":
    for figure in asyncio.run(main()):
        print(figure, flush=True)
