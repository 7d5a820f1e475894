"""`zerowake serve`: one of several replicas of the scaler on Kubernetes, each of which knows everything and can go at any time.

    client → gateway → ledger ─→ external scaler ─gRPC→ KEDA → Deployment → pod, marked by the webhook
              sources ──↑  ↑├──→ surge, first replica ─ /scale ─→ ↑         ↓
                      peers └──→ planner ─gRPC→ restore agents, by their Watch streams ─→ replicas
                                               pods, by their own readiness ────────────────↑

What is one thing in the cluster (the ModelSnapshot controller, bytes that move ahead of need) is done by whichever replica leads; all else
by all, from what the cluster and the agents tell each of them. It is ready when it knows enough to be asked: the declared models, and its
peers' numbers, since KEDA would take a demand that it does not see for none.
At SIGTERM it is not ready at once, hands the lease back and ends KEDA's streams with OK, so that they move to another replica; that one
tells KEDA of the requests held here, as long as there are any. Requests are accepted a little longer, for whoever has not heard yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Coroutine
from typing import TypeVar

from prometheus_client import REGISTRY

from scaler.books.activation import Activations
from scaler.books.activity import Activity
from scaler.books.ledger import Ledger
from scaler.fleet.addresses import Addresses, looked_up
from scaler.fleet.inheritance import inherit
from scaler.fleet.peers import Peers
from scaler.fleet.shared_places import SharedPlaces
from scaler.keda.external_scaler import serve_external_scaler
from scaler.kubernetes.controller import run_controller
from scaler.kubernetes.declarations import Models
from scaler.kubernetes.endpoints import SERVICE_LABEL, EndpointSlice, of_service
from scaler.kubernetes.engine_pod import EnginePod
from scaler.kubernetes.engine_pods import EnginePods
from scaler.kubernetes.first_replica import FirstReplica
from scaler.kubernetes.loading_pods import LoadingPods
from scaler.kubernetes.node_standing import ClusterNode, told_to
from scaler.kubernetes.orphans import Orphans
from scaler.kubernetes.pod_arrivals import PodArrivals
from scaler.kubernetes.posters import Posters
from scaler.kubernetes.refusals import Refusals
from scaler.kubernetes.resources import ENDPOINT_SLICES, MODEL_SNAPSHOTS, NODES, REPORTER, SCALED_OBJECTS, ModelSnapshot
from scaler.kubernetes.scaled_jobs import ScaledJobs
from scaler.kubernetes.scaled_object import ScaledObject
from scaler.kubernetes.service_lookup import ServiceLookup
from scaler.kubernetes.source_conditions import SourceConditions
from scaler.kubernetes.source_declarations import declare_sources
from scaler.kubernetes.startups import Startups
from scaler.kubernetes.surge import Surge
from scaler.kubernetes.taken_names import TakenNames
from scaler.kubernetes.troubles import Troubles, failed_start
from scaler.kubernetes.unmatched import Unmatched
from scaler.kubernetes.webhook import serve_webhook
from scaler.page.site import serve_shown
from scaler.programs.forecasting import Forecasting
from scaler.programs.serve_config import AgentsSection, PeersSection, ServeConfig
from scaler.programs.stopping import stopped_by, unless
from scaler.programs.tracing import traced
from scaler.programs.wiring import Parts, show, wire
from scaler.sources.engine_metrics import engines_of
from scaler.sources.other_gateways import OtherGateways
from scaler.sources.push import Pushes
from scaler.sources.shared_pushes import SharedPushes
from scaler.sources.watch import Sources
from scaler.view.metrics import SourcesCollector
from scaler.view.plan import PlanView
from scaler.view.reading import StateReader
from scaler.view.status import serve_in_pod
from scaler.view.waterfall import Waterfalls
from zerowake_shared import background
from zerowake_shared.address import Address
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.informer import Informer
from zerowake_shared.kubernetes.resource import PODS
from zerowake_shared.listening import check_all_free, check_threads
from zerowake_shared.phases import Phase
from zerowake_shared.pod_contract import SNAPSHOT

log = logging.getLogger(__name__)

T = TypeVar("T")

# Until every node's kube-proxy and every load balancer has heard that this replica is not ready any more.
_LATECOMERS_SECONDS = 3.0


async def serve(config: ServeConfig) -> None:
    """Runs until SIGTERM or SIGINT, then drains; a second one ends it at once.

    Raises:
        ClusterError: there is no cluster to speak to.
        OSError, CannotListen, BadCertificate: an address is taken, or a certificate is of no use.
    """
    check_threads("the scaler")
    check_all_free(config.addresses)
    stop, at_once = stopped_by(signal.SIGTERM, signal.SIGINT)
    identity = os.environ.get("POD_NAME") or socket.gethostname()
    tls = config.tls.files if config.tls else None

    activations = Activations()
    ledger = Ledger(activations=activations)
    activity = Activity(ledger)
    models = Models(ledger)
    peers = Peers(ledger, tls, lambda model: _pushed_elsewhere(activations, activity, model))
    places = SharedPlaces(ledger, peers)
    parts = wire(
        ledger,
        models.planned,
        places=places,
        admits=lambda replica: models.owner(replica.model) == replica.namespace,
        objective=config.objective,
        memory_quotas=config.memory_quotas,
    )
    dispatcher, gateway, nodes, planner = parts.dispatcher, parts.gateway, parts.nodes, parts.planner
    models.on_owner(nodes.reconsider)
    models.on_keep(planner.keep_changed)
    models.on_trigger(planner.triggered)  # and not KEDA's calls: any namespace may name any model in its own
    readiness = _Readiness(stop, peers)
    show(parts)
    reader = StateReader(
        identity,
        ledger=ledger,
        dispatcher=dispatcher,
        nodes=nodes,
        planner=planner,
        models=models.planned,
        next_likely=parts.forecasting.next_likely,
        missing=readiness.missing,
        scale=lambda model: (None, max((each.max_replicas for each in models.objects(model)), default=None)),
        owner=models.owner,
        leads=False,
    )
    plan = PlanView(planner, models.planned, parts.forecasting.explained, readiness.missing, parts.staging_ahead.weigh)
    async with (
        serve_in_pod([*plan.routes, *Waterfalls(activations).routes, *reader.routes]),
        background.beside(reader.run(), "rates of requests"),
        contextlib.AsyncExitStack() as stack,
    ):
        begin = stack.enter_async_context
        await begin(serve_shown(*Address.to_listen(config.metrics), readiness.missing, reader.read, page=config.page))
        cluster = await begin(Cluster.connect(reporter=REPORTER, instance=identity))
        for part in (dispatcher, planner, parts.waker):
            stack.push_async_callback(part.close)
        await begin(background.kept_beside(parts.forecasting.run, "forecast", log))
        stack.push_async_callback(Surge(ledger, cluster, models.objects).close)
        stack.push_async_callback(FirstReplica(ledger, cluster, models.objects).close)
        sources = await begin(_sources(cluster, parts, models, peers, config, reader))
        snapshots, objects, engines = await begin(_objects(cluster, models, parts, readiness, activations, activity))
        await begin(_among(peers, cluster, config, places, parts.forecasting, readiness))
        await begin(nodes.follow_listed(await begin(_members(cluster, config.namespace, config.agents, readiness)), tls))
        if webhook := config.webhook:
            await begin(
                serve_webhook(
                    *Address.to_listen(webhook.listen),
                    webhook.files,
                    snapshots=snapshots,
                    nodes=nodes,
                    setup=config.agents.setup,
                    put_off=lambda: planner.world(()).put_off,
                )
            )
        await begin(traced(activations, gateway))
        bound = await begin(gateway.serve(*Address.to_listen(config.listen)))
        log.info("gateway listens on %s", Address(*bound))
        async with contextlib.AsyncExitStack() as until_stopped:
            refusals = Refusals(cluster, snapshots)
            planner.on_refused(refusals.refused, refusals.complained)
            controller = run_controller(
                cluster,
                snapshots,
                nodes,
                config.agents.setup,
                labelled=engines,
                names=TakenNames(cluster, models),
                unmatched=Unmatched(cluster, models),
                refusals=refusals,
                sources=SourceConditions(models, sources),
                namespace=config.namespace,
                identity=identity,
                also=lambda: reader.while_leading(_leading(parts, Orphans(cluster, nodes, config.agents.orphan_grace_seconds))),
            )
            await until_stopped.enter_async_context(_beside(controller, stop))
            scaler = serve_external_scaler(
                ledger,
                address=config.keda.listen,
                tls=config.keda.tls.files if config.keda.tls else None,
                activity=activity,
                activations=activations,
                owner=models.owner,
                why_not=ScaledJobs(cluster, objects).why_not,
                on_pushed=peers.pushed,
            )
            await until_stopped.enter_async_context(scaler)
            await stop.wait()
            gateway.leaving = True
            log.info(
                "stopping: requests are accepted for %.0f s more, then those that wait have %.0f s; answers are finished",
                _LATECOMERS_SECONDS,
                config.drain_seconds,
            )
        await asyncio.sleep(_LATECOMERS_SECONDS)
        await unless(at_once, gateway.drain(config.drain_seconds))


async def _leading(parts: Parts, orphans: Orphans) -> None:
    """What the leader alone does, beside the controller."""
    async with background.kept_beside(orphans.run, "orphans", log):
        await background.kept(parts.staging_ahead.run, "staging ahead", log)


class _Readiness:
    """Why this replica is not to be asked."""

    def __init__(self, stop: asyncio.Event, peers: Peers) -> None:
        self._stop = stop
        self._peers = peers
        self._lists: dict[str, asyncio.Event] = {}

    def needs(self, name: str, informer: Informer[T]) -> Informer[T]:
        self._lists[name] = informer.synced
        return informer

    async def listed(self) -> None:
        """Until all that is needed has been listed once."""
        for synced in [*self._lists.values()]:
            await synced.wait()

    def missing(self) -> str:
        """Empty: nothing."""
        if self._stop.is_set():
            return "it is draining"
        if unlisted := [name for name, synced in self._lists.items() if not synced.is_set()]:
            return f"{' and '.join(unlisted)} could not be listed so far; the log says why"
        if unheard := self._peers.unheard:
            return f"nothing was heard of its peers so far: {', '.join(unheard)}"
        return ""


@contextlib.asynccontextmanager
async def _objects(
    cluster: Cluster, models: Models, parts: Parts, readiness: _Readiness, activations: Activations, activity: Activity
) -> AsyncIterator[tuple[Informer[ModelSnapshot], Informer[ScaledObject], Informer[EnginePod]]]:
    """What users have made, followed: models as they declare them, and the pods of their engines. With them the nodes."""
    snapshots = readiness.needs("ModelSnapshots", cluster.follow(MODEL_SNAPSHOTS, ModelSnapshot))
    objects = readiness.needs("ScaledObjects", cluster.follow(SCALED_OBJECTS, ScaledObject))
    engines = readiness.needs("pods of models", cluster.follow(PODS, EnginePod, labels=SNAPSHOT))
    models.follow(snapshots, objects)
    pods = EnginePods(parts.readiness, models, snapshots)
    parts.dispatcher.explained_by(Troubles(pods.of_model, models.objects, models.owner).of)

    def look(old: EnginePod | None, new: EnginePod | None) -> None:
        if new is not None and (why := failed_start(old, new)) and (model := pods.model_of(new)):
            parts.dispatcher.start_failed(model, f"pod {new.metadata.name} {why}")

    engines.on_change(look)
    engines.on_change(Startups(activations, pods.model_of).changed)
    arrivals = PodArrivals(pods.model_of, lambda model: parts.planner.consider([model]))
    parts.planner.arriving_by(arrivals.nodes)
    engines.on_change(arrivals.changed)
    loading = LoadingPods(pods.model_of)
    activity.counts_loading(loading.of)
    engines.on_change(loading.changed)
    standings = told_to(parts.nodes, readiness.needs("nodes", cluster.follow(NODES, ClusterNode)))
    async with snapshots, objects, pods.following(engines), engines, standings:
        yield snapshots, objects, engines


@contextlib.asynccontextmanager
async def _sources(
    cluster: Cluster, parts: Parts, models: Models, peers: Peers, config: ServeConfig, reader: StateReader
) -> AsyncIterator[Sources]:
    """What is asked of models past all gateways, followed. Each replica asks for itself, and tells the others what it was told."""
    permitted = frozenset(host.lower() for host in config.sources.hosts)
    engines, others = functools.partial(engines_of, parts.dispatcher), OtherGateways(peers).tally
    async with Sources(parts.ledger, engines=engines, lookup=ServiceLookup(cluster, permitted).addresses, others=others) as sources:
        reader.asked_by(sources.states_of)
        declare_sources(models, sources, permitted)
        pushes = SharedPushes(sources, peers, models.owner)
        models.on_sources(pushes.declared)
        REGISTRY.register(SourcesCollector(sources))
        if config.push is None:
            yield sources
        else:
            async with Pushes(pushes, Posters(cluster, models.owner)).serve(*Address.to_listen(config.push.listen)):
                yield sources


@contextlib.asynccontextmanager
async def _members(
    cluster: Cluster, namespace: str, section: PeersSection | AgentsSection, readiness: _Readiness
) -> AsyncIterator[Addresses]:
    """Where the programs of a section are."""
    if section.service:
        labels = f"{SERVICE_LABEL}={section.service}"
        slices = cluster.follow(ENDPOINT_SLICES, EndpointSlice, namespace=namespace, labels=labels)
        addresses = of_service(readiness.needs(f"endpoints of {section.service}", slices), section.member_port)
        async with slices:
            yield addresses
    else:
        async with looked_up(section.addresses) as addresses:
            yield addresses


@contextlib.asynccontextmanager
async def _among(
    peers: Peers, cluster: Cluster, config: ServeConfig, places: SharedPlaces, forecasting: Forecasting, readiness: _Readiness
) -> AsyncIterator[None]:
    """Takes part among the other replicas, where there are any, until the block ends."""
    if config.peers is None:
        yield
        return

    async def inherited() -> None:
        await readiness.listed()  # a forecast keeps nothing of models that are not known
        await inherit(peers, forecasting.adopt)

    peers.forecast = forecasting.told
    async with (
        _members(cluster, config.namespace, config.peers, readiness) as members,
        peers.serve(config.peers.listen),
        peers.follow(members),
        background.kept_beside(inherited, "forecast of another replica", log),
    ):
        try:
            yield
        finally:
            places.close()


def _pushed_elsewhere(activations: Activations, activity: Activity, model: str) -> None:
    """Another replica has told KEDA of the model's use, of a request that is held here maybe."""
    activity.tell(model)
    if activation := activations.current(model):
        activation.mark(Phase.PUSHED)


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[object, object, None], stop: asyncio.Event) -> AsyncIterator[None]:
    """Runs it until the block ends; if it ends before, so does the program, with its error."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda _: stop.set())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
