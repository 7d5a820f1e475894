"""The admission webhook: pods labelled `zerowake.dev/snapshot` are marked for the agents, which restore their engine (pod_patch.py).

It stands in the way of every such pod's creation, so it answers from memory alone: the snapshots that an informer holds, and the nodes
that the agents' streams describe. It never refuses a pod and never fails one: whatever is missing or odd, the pod starts as it would have,
with a warning that `kubectl` shows to whoever made it, and an annotation that says why, of which the controller makes a condition and an
event. The API server is told to ask for labelled pods only, not to wait for long, to ask once more where nobody answered, and to go on
without an answer (failure policy Ignore).
"""

from __future__ import annotations

import base64
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import Counter, Histogram

from scaler.kubernetes.declarations import planned
from scaler.kubernetes.node_standing import demands_of
from scaler.kubernetes.pod_patch import NodeSetup, Patch, prepare, unfit
from scaler.kubernetes.resources import CONDITION_READY, PENDING, ModelSnapshot
from scaler.plan.policy import prefer
from scaler.plan.rungs import Rung
from scaler.plan.world import Node, World
from zerowake_shared.kubernetes.informer import Informer
from zerowake_shared.kubernetes.note import fitted
from zerowake_shared.pod_contract import CAPTURE, COLD, RESTORE, SNAPSHOT
from zerowake_shared.tls import TlsFiles, server_context
from zerowake_shared.web_server import served

log = logging.getLogger(__name__)

PATH = "/mutate-pods"
PODS = Counter("zerowake_webhook_pods_total", "Pods that the admission webhook was asked about, by outcome.", ["outcome"])
SECONDS = Histogram(
    "zerowake_webhook_seconds",
    "How long the admission webhook took over one pod.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1),
)
_REVIEW_BYTES = 8 << 20  # the API server's own bound on an object is 3 MB, and a review holds up to two


class _Request(msgspec.Struct):
    """The pod that is asked about."""

    uid: str
    namespace: str = ""
    object: dict[str, Any] = {}


class _Review(msgspec.Struct):
    """admission.k8s.io/v1 AdmissionReview, as far as it is read."""

    request: _Request


class _Untouched(Exception):
    """Why this pod stays as it is. `told`: it asked for a snapshot, so whoever made it hears of it."""

    def __init__(self, outcome: str, told: str = "") -> None:
        self.outcome = outcome
        self.told = told
        super().__init__(outcome)


class Webhook:
    """Reviews pods. `nodes`: scaler.fleet.nodes.Nodes, or any iterable of nodes. `put_off`: what agents have refused, as in a World."""

    def __init__(
        self,
        snapshots: Informer[ModelSnapshot],
        nodes: Iterable[Node],
        setup: NodeSetup,
        put_off: Callable[[], Mapping[tuple[str, str, Rung], float]] = dict,
    ) -> None:
        self._snapshots = snapshots
        self._nodes = nodes
        self._setup = setup
        self._put_off = put_off
        self._decoder = msgspec.json.Decoder(_Review)

    def review(self, body: bytes) -> bytes:
        """The answer to an AdmissionReview. Raises: msgspec.MsgspecError: it is none."""
        begun = time.perf_counter()
        try:
            request = self._decoder.decode(body).request
        except (UnicodeDecodeError, RecursionError) as error:
            raise msgspec.DecodeError(str(error)) from None
        response: dict[str, Any] = {"uid": request.uid, "allowed": True}
        try:
            patch = self._patch(request)
            outcome = "marked"
            response |= _patched(patch)
        except _Untouched as untouched:
            outcome = untouched.outcome
            if untouched.told:
                response["warnings"] = [f"zerowake: this pod is started, not restored: {untouched.told}"[:256]]
                patch = Patch(request.object)
                patch.put(fitted(untouched.told, 1000), "metadata", "annotations", COLD)
                response |= _patched(patch)
        except Exception:  # a pod of a shape we did not foresee: Kubernetes would start it, so it is started
            outcome = "error"
            response = {"uid": request.uid, "allowed": True}
            log.exception("a pod in namespace %s passes untouched", request.namespace)
        PODS.labels(outcome).inc()
        SECONDS.observe(time.perf_counter() - begun)
        return msgspec.json.encode({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response})

    def _patch(self, request: _Request) -> Patch:
        pod, namespace = request.object, request.namespace
        metadata = pod.get("metadata") or {}
        name = (metadata.get("labels") or {}).get(SNAPSHOT, "")
        if not name or CAPTURE in metadata["labels"]:
            raise _Untouched("not-ours")
        if (metadata.get("annotations") or {}).get(RESTORE) == "false":
            raise _Untouched("opted-out")
        if not self._snapshots.synced.is_set():
            raise _Untouched("not-synced", "the webhook has just started and does not know the snapshots yet")
        snapshot = self._snapshots.get(namespace, name)
        if snapshot is None:
            raise _Untouched("no-snapshot", f"there is no ModelSnapshot {name!r} in namespace {namespace!r}")
        digest = snapshot.ready_digest
        if not digest:
            raise _Untouched("not-ready", f"ModelSnapshot {name!r} {_not_ready(snapshot)}")
        if reason := unfit(pod["spec"], snapshot, self._setup):
            raise _Untouched("unfit", reason)
        nodes = tuple(self._nodes)
        if not nodes:  # and none that is only away: nobody would restore it, and its node may lack the profile that agents bring
            raise _Untouched("no-agent", "no restore agent is listed in the cluster")
        patch = Patch(pod)
        model = replace(planned(snapshot), pods=demands_of(pod["spec"]))  # by what this pod says, whatever the template does
        # Where it stands now is all that counts, and what was refused last, however long ago: nobody has fetched it there since.
        world = World(now=-math.inf, models={}, nodes=nodes, put_off=self._put_off())
        prepare(patch, snapshot, self._setup, prefer(world, model, digest), digest)
        return patch


def _not_ready(snapshot: ModelSnapshot) -> str:
    if snapshot.metadata.deletion_timestamp:
        return "is being deleted"
    if snapshot.status.holds(CONDITION_READY):
        return "is not captured anew yet: its template has changed"
    ready = snapshot.status.condition(CONDITION_READY)
    why = f": {ready.reason}: {ready.message}" if ready else ""
    return f"is not Ready ({snapshot.status.phase or PENDING}){why}"


def _patched(patch: Patch) -> dict[str, str]:
    return {"patchType": "JSONPatch", "patch": base64.b64encode(msgspec.json.encode(patch.operations)).decode()}


@asynccontextmanager
async def serve_webhook(
    host: str,
    port: int,
    tls: TlsFiles,
    *,
    snapshots: Informer[ModelSnapshot],
    nodes: Iterable[Node],
    setup: NodeSetup,
    put_off: Callable[[], Mapping[tuple[str, str, Rung], float]] = dict,
) -> AsyncIterator[tuple[str, int]]:
    """Serves the webhook over HTTPS until the block ends; yields the bound address (port 0: any). Every replica of the scaler does.

    snapshots: `cluster.follow(MODEL_SNAPSHOTS, ModelSnapshot)`; it need not have synced. nodes: scaler.fleet.nodes.Nodes. setup: where
    agents run, as the chart's values say. put_off: Executor.put_off, looked at anew for each pod.
    The certificate is read again when it changes.

    Raises:
        BadCertificate: the files cannot be used. OSError: the address cannot be listened on.
    """
    webhook = Webhook(snapshots, nodes, setup, put_off)

    async def handle(request: web.Request) -> web.Response:
        try:
            answer = webhook.review(await request.read())
        except msgspec.MsgspecError as error:
            return web.Response(status=400, text=f"this is no AdmissionReview: {error}\n")
        response = web.Response(body=answer, content_type="application/json")
        # Kept, a connection to a replica that is lost with its node would be asked in vain once more, for up to 90 s.
        response.force_close()
        return response

    app = web.Application(client_max_size=_REVIEW_BYTES)
    app.add_routes([web.post(PATH, handle)])
    async with served(app, host, port, "the webhook", server_context(tls)) as bound:
        yield bound
