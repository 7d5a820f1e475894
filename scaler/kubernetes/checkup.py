"""What `zerowake doctor --kubernetes` finds of a cluster: its API, the objects that zerowake and KEDA bring, agents, nodes, the webhook.

What nobody may look at is a warning and says so. Where the API does not answer at all, one line tells, and the others say nothing.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import functools
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from scaler.books.trigger import FROM_ENV, BadTrigger, parse_trigger
from scaler.kubernetes.resources import CONTROLLER_LEASE, LEASES, MODEL_SNAPSHOTS, NODES, SCALED_OBJECTS, Metadata, ModelSnapshot
from scaler.kubernetes.scaled_object import TRIGGER_TYPES, ScaledObject
from zerowake_shared.checkup import Check, Finding, Subject, fails, ok, told, warning
from zerowake_shared.clock import SYSTEM_CLOCK
from zerowake_shared.kubernetes.errors import ClusterError, NotFound
from zerowake_shared.kubernetes.resource import PODS, Resource

if TYPE_CHECKING:
    from zerowake_shared.kubernetes.cluster import Cluster

Look = Callable[["Cluster", Subject], Awaitable[Sequence[Finding]]]

_DEFINITIONS = Resource("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions")
_WEBHOOKS = Resource("admissionregistration.k8s.io/v1", "MutatingWebhookConfiguration", "mutatingwebhookconfigurations")
_DAEMON_SETS = Resource("apps/v1", "DaemonSet", "daemonsets")
_SECRETS = Resource("v1", "Secret", "secrets")
_OWN_ACCESS = Resource("authorization.k8s.io/v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews")
_ACCESS = Resource("authorization.k8s.io/v1", "SubjectAccessReview", "subjectaccessreviews")
_SECONDS = 20.0
_KEDA_TRIED = "2.21"
_RUNTIMES = {"containerd": (2, 2), "cri-o": (1, 34)}  # the oldest with the plugin interface (NRI) that agents need
_NOT_RUN = "cri-o"
_STREAMS = re.compile(r'^zerowake_keda_streams_open\{rpc="StreamIsActive"\} (\S+)$', re.MULTILINE)
_SKEW_SECONDS = 5.0
_LEASE_SECONDS = 60.0  # a node that is ready renews its own every ten
_SOON = datetime.timedelta(days=30)
_UPGRADE = "helm upgrade --install zerowake deploy/helm/zerowake --namespace {}"
# What templates/rbac.yaml gives the scaler, and it cannot do without: verb, group, kind, subresource, name (empty: any), and `True` where
# it is of its own namespace alone. Who has a right to one object is told no when he asks about all of its kind.
_RIGHTS = (
    ("list", "zerowake.dev", "modelsnapshots", "", "", False),
    ("patch", "zerowake.dev", "modelsnapshots", "status", "", False),
    ("list", "", "pods", "", "", False),
    ("create", "", "pods", "", "", False),
    ("create", "events.k8s.io", "events", "", "", False),
    ("list", "", "nodes", "", "", False),
    ("list", "keda.sh", "scaledobjects", "", "", False),
    ("patch", "apps", "deployments", "scale", "", False),
    ("list", "discovery.k8s.io", "endpointslices", "", "", True),
    ("patch", "coordination.k8s.io", "leases", "", CONTROLLER_LEASE, True),
)


class _Thing(msgspec.Struct, frozen=True, rename="camel"):
    """Any object, of which little is read."""

    metadata: Metadata
    spec: dict[str, Any] = {}
    status: dict[str, Any] = {}
    data: dict[str, str] = {}
    webhooks: tuple[dict[str, Any], ...] = ()

    @property
    def is_ready(self) -> bool:
        return self.condition("Ready").get("status") == "True"

    def condition(self, kind: str) -> dict[str, Any]:
        return next((each for each in self.status.get("conditions") or () if each.get("type") == kind), {})


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[Cluster]:
    """Raises ClusterError: neither a service account nor a kubeconfig can be used."""
    from zerowake_shared.kubernetes.cluster import Cluster  # noqa: PLC0415  its import takes longer than all our own

    async with Cluster.connect(reporter="zerowake.dev/doctor", instance="doctor") as cluster:
        yield cluster


def asked(look: Look) -> Callable[[Subject], Awaitable[Sequence[Finding]]]:
    """`look`, with a cluster to ask."""

    @functools.wraps(look)
    async def check(subject: Subject) -> Sequence[Finding]:
        try:
            async with connected() as cluster:
                return await look(cluster, subject)
        except ClusterError as error:
            if not error.status:
                return []  # `api` tells, once
            return [warning(f"not known: {error}", "look as somebody who may: the cluster's administrator")]

    return check


async def api(_: Subject) -> Sequence[Finding]:
    """Whether it answers, and how far its clock is from ours."""
    try:
        async with connected() as cluster:
            what, wall = await cluster.version()
    except ClusterError as error:
        return [told(error)] if "; " in str(error) else [fails(str(error), "correct KUBECONFIG, or reach its API server from here")]
    skew = wall - SYSTEM_CLOCK.wall()
    if abs(skew) > _SKEW_SECONDS:
        text = f"{what}, whose clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
        return [warning(text, "keep both right (NTP): certificates and leases go by it")]
    return [ok(f"{what} answers")]


@asked
async def definitions(cluster: Cluster, subject: Subject) -> Sequence[Finding]:
    """The kinds of objects that zerowake and KEDA bring, and of which version they are."""
    keda = "install KEDA: helm install keda kedacore/keda --namespace keda --create-namespace"
    ours, found = _UPGRADE.format(subject.namespace), []
    for name, remedy, wanted in (("modelsnapshots.zerowake.dev", ours, version("zerowake")), ("scaledobjects.keda.sh", keda, _KEDA_TRIED)):
        try:
            definition = await cluster.get(_DEFINITIONS, "", name, _Thing)
        except NotFound:
            found.append(fails("there is none", remedy, name))
            continue
        served = [each["name"] for each in definition.spec.get("versions") or () if each.get("served")]
        label = definition.metadata.labels.get("app.kubernetes.io/version", "")
        if "v1alpha1" not in served:
            found.append(fails(f"serves {', '.join(served) or 'nothing'}, and not v1alpha1", remedy, name))
        elif definition.condition("Established").get("status") != "True":
            found.append(fails("is not established", f"kubectl describe crd {name}", name))
        elif label and not label.startswith(wanted):
            found.append(warning(f"of version {label}; {wanted} was tried with this zerowake", f"use that: {remedy}", name))
        else:
            found.append(ok(f"v1alpha1{', of version ' + label if label else ''}", name))
    return found


@asked
async def keda(cluster: Cluster, subject: Subject) -> Sequence[Finding]:
    """Whether its operator runs, and holds its streams to the scaler: else nobody would wake a model."""
    operators = await cluster.every(PODS, _Thing, labels="app=keda-operator")
    ready = [each for each in operators if each.is_ready]
    found = [ok(f"operator {pod.metadata.namespace}/{pod.metadata.name} is ready") for pod in ready]
    if operators and not ready:
        about = operators[0].metadata
        found = [fails(f"operator {about.name} is not ready", f"kubectl --namespace {about.namespace} describe pod {about.name}")]
    scalers = await cluster.every(PODS, _Thing, subject.namespace, "app.kubernetes.io/name=zerowake-scaler")
    if not any(each.is_ready for each in scalers):
        remedy = f"kubectl --namespace {subject.namespace} get pods; {_UPGRADE.format(subject.namespace)}"
        return [*found, fails(f"no replica of the scaler is ready in namespace {subject.namespace}", remedy, "scaler")]
    wanted = [each for each in await cluster.every(SCALED_OBJECTS, ScaledObject) if each.trigger]
    streams = 0.0
    for pod in scalers:
        try:
            page = await cluster.text(PODS.path(subject.namespace, f"{pod.metadata.name}:9090", "proxy/metrics"))
        except ClusterError as error:
            remedy = "look at zerowake_keda_streams_open of its metrics; the API server may be kept away by a NetworkPolicy"
            return [*found, warning(f"not known: {error}", remedy, "connected")]
        streams += sum(float(each) for each in _STREAMS.findall(page))
    if not wanted:
        return [*found, ok("no ScaledObject has a trigger of zerowake's yet", "connected")]
    if not streams:
        said = f"KEDA holds no stream, with {len(wanted)} ScaledObjects: nobody would wake their models"
        remedy = "look at the log of KEDA's operator, the triggers' scalerAddress, and the chart's keda.namespace (its NetworkPolicy)"
        return [*found, fails(said, remedy, "connected")]
    return [*found, ok(f"{streams:.0f} streams for {len(wanted)} ScaledObjects", "connected")]


@asked
async def scaled_objects(cluster: Cluster, _: Subject) -> Sequence[Finding]:
    """Those with a trigger of ours: whether it is right, its model known, and what KEDA says of it."""
    snapshots = await cluster.every(MODEL_SNAPSHOTS, ModelSnapshot)
    found, right = [], 0
    for each in await cluster.every(SCALED_OBJECTS, _Thing):
        triggers = [t.get("metadata") or {} for t in each.spec.get("triggers") or () if t.get("type") in TRIGGER_TYPES]
        of, namespace = f"{each.metadata.namespace}/{each.metadata.name}", each.metadata.namespace
        for metadata in (metadata for metadata in triggers if "model" in metadata):
            models = {name for one in snapshots if one.metadata.namespace == namespace for name in (one.model, *one.spec.names)}
            ready = each.condition("Ready")
            try:
                model = parse_trigger({key: value for key, value in metadata.items() if not key.endswith(FROM_ENV)}).model
            except BadTrigger as error:
                found.append(fails(str(error), f"correct it: kubectl --namespace {namespace} edit scaledobject {each.metadata.name}", of))
                continue
            if model not in models:
                near = get_close_matches(model, models, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]}?" if near else f"make a ModelSnapshot of that model in namespace {namespace}"
                found.append(warning(f"no ModelSnapshot of its namespace is of the model {model!r}: its pods start cold", hint, of))
            elif ready.get("status") == "False":
                found.append(fails(f"KEDA: {ready.get('message')}", "look at the log of KEDA's operator", of))
            else:
                right += 1
    return [ok(f"{right} in order"), *found]


@asked
async def agents(cluster: Cluster, subject: Subject) -> Sequence[Finding]:
    """On which nodes one is ready, and why none is on the others."""
    namespace = subject.namespace
    try:
        daemon = await cluster.get(_DAEMON_SETS, namespace, "zerowake-agent", _Thing)
    except NotFound:
        remedy = f"{_UPGRADE.format(namespace)}; installed elsewhere: --namespace"
        return [fails(f"no DaemonSet zerowake-agent in namespace {namespace}", remedy)]
    wanted = (daemon.spec.get("template") or {}).get("spec", {}).get("nodeSelector") or {}
    pods = await cluster.every(PODS, _Thing, namespace, "app.kubernetes.io/name=zerowake-agent")
    nodes = await cluster.every(NODES, _Thing)
    chosen = [each for each in nodes if wanted.items() <= {"kubernetes.io/os": "linux", **each.metadata.labels}.items()]
    lacking = [finding for node in chosen if (finding := _lack(node, pods))]
    text = f"{len(chosen) - len(lacking)} of {len(chosen)} nodes have one that is ready"
    if left := sorted(each.metadata.name for each in nodes if each not in chosen):
        text += f"; without the labels of agent.nodeSelector: {', '.join(left[:5])}{', …' if len(left) > 5 else ''}"
    return [(ok if chosen else warning)(text), *lacking]


def _lack(node: _Thing, pods: Sequence[_Thing]) -> Finding | None:
    """Why no agent is ready on a node."""
    name = node.metadata.name
    there = next((each for each in pods if each.spec.get("nodeName") == name), None)
    if there and there.is_ready:
        return None
    if not node.is_ready and node.status.get("conditions"):
        return warning(f"the node is not ready: {node.condition('Ready').get('message', '')}", f"kubectl describe node {name}", name)
    if there is None:
        waits = next((each.condition("PodScheduled").get("message", "") for each in pods if _is_for(each, name)), "")
        return fails(f"no agent's pod on it{': ' + waits if waits else ''}", "kubectl describe daemonset zerowake-agent", name)
    states = [state for each in there.status.get("containerStatuses") or () for state in (each.get("state") or {}).values()]
    why = "; ".join(f"{each.get('reason', '')} {each.get('message', '')}".strip() for each in states if each.get("reason"))
    remedy = f"kubectl --namespace {there.metadata.namespace} logs {there.metadata.name} --all-containers"
    return fails(f"{there.metadata.name} is not ready: {why or there.status.get('phase', 'Pending')}", remedy, name)


def _is_for(pod: _Thing, node: str) -> bool:
    """A DaemonSet's controller says by the pod's affinity which node it is for."""
    return not pod.spec.get("nodeName") and f'"{node}"' in msgspec.json.encode(pod.spec.get("affinity")).decode()


@asked
async def runtimes(cluster: Cluster, _: Subject) -> Sequence[Finding]:
    """What runs containers on each node, as the node reports it."""
    found, fine = [], []
    for node in await cluster.every(NODES, _Thing):
        about = node.status.get("nodeInfo") or {}
        runtime = str(about.get("containerRuntimeVersion", ""))
        name, number = runtime.split("://", 1) if "://" in runtime else (runtime, "")
        digits = re.match(r"v?(\d+)\.(\d+)", number)
        oldest = _RUNTIMES.get(name)
        if oldest is None or digits is None or (int(digits[1]), int(digits[2])) < oldest:
            remedy = "use containerd 2.2 or CRI-O 1.34, or later: agents need its plugin interface (NRI)"
            found.append(fails(f"{runtime or 'no container runtime'}: nothing is restored into its pods", remedy, node.metadata.name))
        elif name == _NOT_RUN:
            found.append(warning(f"{runtime} has what is needed and was never tried", "tell how it went", node.metadata.name))
        else:
            fine.append(f"{runtime.replace('://', ' ')} on Linux {about.get('kernelVersion', '?')}")
    return [*(ok(f"{number} × {what}") for what, number in sorted(Counter(fine).items())), *found]


@asked
async def webhook(cluster: Cluster, subject: Subject) -> Sequence[Finding]:
    """Whether the API server can believe it, and until when."""
    try:
        configuration = await cluster.get(_WEBHOOKS, "", "zerowake", _Thing)
        secret = await cluster.get(_SECRETS, subject.namespace, "zerowake-scaler-tls", _Thing)
    except NotFound as error:
        return [fails(f"it is not installed: {error}", _UPGRADE.format(subject.namespace))]
    anew = f"delete the Secrets zerowake-*-tls, and {_UPGRADE.format(subject.namespace)}; with cert-manager: look at its Certificates"
    try:
        bundle = base64.b64decode(configuration.webhooks[0]["clientConfig"]["caBundle"])
        authorities = x509.load_pem_x509_certificates(bundle)
        own = x509.load_pem_x509_certificate(base64.b64decode(secret.data["tls.crt"]))
    except (ValueError, LookupError) as error:
        return [fails(f"its certificate, or the authority that the API server is told of, is none ({error})", anew)]
    if not any(_issued(own, each) for each in authorities):
        return [fails("its certificate is not from the authority that the API server is told of: no pod is marked for restoring", anew)]
    end = min(own.not_valid_after_utc, *(each.not_valid_after_utc for each in authorities))
    left = end - datetime.datetime.fromtimestamp(SYSTEM_CLOCK.wall(), datetime.UTC)
    if left < datetime.timedelta(0):
        return [fails(f"its certificate ended on {end:%Y-%m-%d}: no pod is marked for restoring", anew)]
    if left < _SOON:
        return [warning(f"its certificate ends on {end:%Y-%m-%d}", anew)]
    return [ok(f"its certificate is good until {end:%Y-%m-%d}")]


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


@asked
async def rights(cluster: Cluster, subject: Subject) -> Sequence[Finding]:
    """What the scaler may do: asked as itself in its pod, else about its ServiceAccount."""
    namespace, is_itself = subject.namespace, "POD_NAME" in os.environ

    async def may(verb: str, group: str, plural: str, sub: str, name: str, own: bool) -> str:
        attributes = {"verb": verb, "group": group, "resource": plural, "subresource": sub, "name": name}
        attributes["namespace"] = namespace if own else ""
        spec: dict[str, Any] = {"resourceAttributes": attributes}
        if not is_itself:
            spec |= {"user": f"system:serviceaccount:{namespace}:zerowake-scaler"}
            spec |= {"groups": ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]}
        answer = msgspec.json.decode(await cluster.create(_OWN_ACCESS if is_itself else _ACCESS, "", {"spec": spec}))
        return "" if answer["status"].get("allowed") else f"{verb} {plural}{'/' + sub if sub else ''}{'.' + group if group else ''}"

    missing = [each for each in await asyncio.gather(*(may(*right) for right in _RIGHTS)) if each]
    if missing:
        return [fails(f"the scaler may not {', '.join(missing)}", f"{_UPGRADE.format(namespace)}: its ClusterRole and Role have them")]
    return [ok(f"the scaler may do all {len(_RIGHTS)} things that it does")]


@asked
async def clocks(cluster: Cluster, _: Subject) -> Sequence[Finding]:
    """Of the nodes, by the leases that they renew."""
    wall = (await cluster.version())[1]
    ready = {each.metadata.name for each in await cluster.every(NODES, _Thing) if each.is_ready}
    found, leases = [], await cluster.every(LEASES, _Thing, "kube-node-lease")
    for lease in leases:
        with contextlib.suppress(KeyError, ValueError):
            skew = datetime.datetime.fromisoformat(lease.spec["renewTime"]).timestamp() - wall
            if skew > _SKEW_SECONDS or (skew < -_LEASE_SECONDS and lease.metadata.name in ready):
                text = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the API server's"
                found.append(warning(text, "keep it right (NTP)", lease.metadata.name))
    return found or [ok(f"{len(leases)} nodes keep the API server's time")]


CHECKS = tuple(
    Check(name, look, _SECONDS, of_cluster=True)
    for name, look in (
        ("API", api),
        ("definition", definitions),
        ("rights", rights),
        ("KEDA", keda),
        ("ScaledObjects", scaled_objects),
        ("agents", agents),
        ("container runtime", runtimes),
        ("webhook", webhook),
        ("clocks", clocks),
    )
)
