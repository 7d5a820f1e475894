"""`ModelSnapshot`, and what else of the cluster's objects the scaler reads, typed.

The schema that the API server enforces is in the chart (deploy/helm/zerowake/templates/crd.yaml); these are the same fields as Python sees
them. Whatever else an object carries is left alone, since every write is a patch.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from scaler.books.limits import ModelLimits
from zerowake_shared.kubernetes.resource import Resource, timestamp
from zerowake_shared.pod_contract import GROUP

FINALIZER = f"{GROUP}/artifact"
CONTROLLER_LEASE = "zerowake-controller"  # who leads has it
REPORTER = f"{GROUP}/scaler"  # of events

MODEL_SNAPSHOTS = Resource(f"{GROUP}/v1alpha1", "ModelSnapshot", "modelsnapshots")
NODES = Resource("v1", "Node", "nodes")
SERVICES = Resource("v1", "Service", "services")
TOKEN_REVIEWS = Resource("authentication.k8s.io/v1", "TokenReview", "tokenreviews")
LEASES = Resource("coordination.k8s.io/v1", "Lease", "leases")
ENDPOINT_SLICES = Resource("discovery.k8s.io/v1", "EndpointSlice", "endpointslices")
SCALED_OBJECTS = Resource("keda.sh/v1alpha1", "ScaledObject", "scaledobjects")

PENDING, CAPTURING, READY, FAILED = "Pending", "Capturing", "Ready", "Failed"
CAPTURE_ENDS = "CapturePodEnding"  # reason for not being Ready: what is captured can be restored, and its pod has the room for that still
CONDITION_CAPTURED, CONDITION_READY, CONDITION_RESTORES = "Captured", "Ready", "Restores"
CONDITION_STALE = "StaleEnvironment"
CONDITION_STORED, CONDITION_COPIED = "Stored", "Copied"
CONDITION_SOURCES = "Sources"


class _Object(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A part of an object, under the API's names."""


class Metadata(_Object, frozen=True):
    """What every object has."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: str = ""
    deletion_timestamp: str | None = None
    finalizers: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    owner_references: tuple[dict[str, Any], ...] = ()


class Meta(_Object, frozen=True):
    """Any object of which only the metadata is of interest."""

    metadata: Metadata


class Artifact(_Object, frozen=True):
    """One that is on nodes already: it is adopted, not captured."""

    name: str
    digest: str


class Canary(_Object, frozen=True):
    """The request whose answer a restored engine has to repeat."""

    path: str
    body: Any = None


class Limits(_Object, frozen=True):
    """What the gateway holds for the model, and what one replica works on."""

    concurrency: int = 8
    max_wait_seconds: float = 300.0
    max_requests: int = 10_000


class Spec(_Object, frozen=True):
    """What the owner of a ModelSnapshot asks for."""

    model: str = ""
    names: tuple[str, ...] = ()
    template: dict[str, Any] | None = None
    artifact: Artifact | None = None
    container: str = ""
    port: int = 8000
    health_path: str = "/health"
    canary: Canary | None = None
    node_selector: dict[str, str] = {}
    limits: Limits = Limits()
    stage: str = "memory"
    pin: str = "absent"
    idle: str = "drop"
    idle_seconds: float = 300.0
    stale_environment: str = ""
    store: str = ""
    copies: int = 1
    sources: tuple[dict[str, Any], ...] = ()


IN_STORE = "store"  # the rung of a location that is no node


class Location(_Object, frozen=True):
    """Where the artifact is: a node's name and the rung it stands on there, or the URL of a store that keeps it.

    digest, since: of a store: what it keeps, and the moment (RFC 3339) since which that is known.
    """

    name: str
    rung: str
    digest: str = ""
    since: str = ""


class Condition(_Object, frozen=True, omit_defaults=False):
    """One condition of a status, as Kubernetes has them."""

    type: str
    status: str
    reason: str = ""
    message: str = ""
    last_transition_time: str = ""
    observed_generation: int = 0


class Status(_Object, frozen=True):
    """What the controller says of a ModelSnapshot."""

    phase: str = ""
    model: str = ""
    digest: str = ""
    image_bytes: int = 0
    weights_bytes: int = 0
    gpu_bytes: tuple[int, ...] = ()
    locations: tuple[Location, ...] = ()
    asleep: int = 0
    conditions: tuple[Condition, ...] = ()
    observed_generation: int = 0
    template_hash: str = ""
    contents_hash: str = ""

    @property
    def holders(self) -> tuple[Location, ...]:
        """The nodes among its locations."""
        return tuple(each for each in self.locations if each.rung != IN_STORE)

    @property
    def stored(self) -> Location | None:
        """The store among its locations."""
        return next((each for each in self.locations if each.rung == IN_STORE), None)

    def condition(self, kind: str) -> Condition | None:
        return next((each for each in self.conditions if each.type == kind), None)

    def holds(self, kind: str) -> bool:
        condition = self.condition(kind)
        return condition is not None and condition.status == "True"


class ModelSnapshot(_Object, frozen=True):
    """zerowake.dev/v1alpha1 ModelSnapshot."""

    metadata: Metadata
    spec: Spec
    status: Status = Status()

    @property
    def key(self) -> tuple[str, str]:
        return self.metadata.namespace, self.metadata.name

    @property
    def model(self) -> str:
        return self.spec.model or self.metadata.name

    @property
    def artifact_name(self) -> str:
        """The artifact's name in the agents' stores; its namespace there is the object's own."""
        return self.spec.artifact.name if self.spec.artifact else self.metadata.name

    @property
    def stored(self) -> Location | None:
        """The store that its owner names, where that keeps what was captured last."""
        found = self.status.stored
        return found if found and (found.name, found.digest) == (self.spec.store, self.status.digest) else None

    @property
    def ready_digest(self) -> str:
        """The digest to restore from; empty while there is none, or none of the template as it is now."""
        ready = self.status.condition(CONDITION_READY)
        is_there = ready is not None and (ready.status == "True" or ready.reason == CAPTURE_ENDS)
        if not is_there or self.metadata.deletion_timestamp:
            return ""
        current = self.spec.template is None or self.status.template_hash == self.template_hash
        return self.status.digest if current else ""

    @property
    def limits(self) -> ModelLimits:
        limits = self.spec.limits
        return ModelLimits(concurrency=limits.concurrency, max_wait_seconds=limits.max_wait_seconds, max_requests=limits.max_requests)

    @property
    def template_hash(self) -> str:
        """Changes with whatever a capture is made from: only then is another one needed."""
        spec = self.spec
        source = (spec.template, spec.container, spec.port, spec.health_path, spec.canary, spec.node_selector, self.model)
        return hashlib.blake2b(msgspec.json.encode(source, order="sorted"), digest_size=5).hexdigest()


class ContainerState(_Object, frozen=True):
    """What the kubelet says of one container, where it does not run."""

    terminated: dict[str, Any] | None = None
    waiting: dict[str, Any] | None = None


class ContainerStatus(_Object, frozen=True):
    """The state of a container, by its name."""

    name: str
    state: ContainerState = ContainerState()


class PodStatus(_Object, frozen=True):
    """How far a pod is, and why it is no further."""

    phase: str = ""
    reason: str = ""
    message: str = ""
    conditions: tuple[Condition, ...] = ()
    container_statuses: tuple[ContainerStatus, ...] = ()


class PodSpec(_Object, frozen=True):
    """Where a pod runs."""

    node_name: str = ""


class Pod(_Object, frozen=True):
    """What the controller reads of a capture pod."""

    metadata: Metadata
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def has_ended(self) -> bool:
        """No container of it runs any more, and none will: it takes up no room."""
        return self.status.phase in {"Failed", "Succeeded"}


class ServiceSpec(_Object, frozen=True):
    """Where a Service is."""

    type: str = ""
    cluster_ip: str = msgspec.field(name="clusterIP", default="")


class Service(_Object, frozen=True):
    """A Service."""

    metadata: Metadata
    spec: ServiceSpec = ServiceSpec()


class User(_Object, frozen=True):
    """Whom the API server knows."""

    username: str = ""


class TokenReviewStatus(_Object, frozen=True):
    """Whose a token is. audiences: for whom it is, of those that were asked for."""

    authenticated: bool = False
    audiences: tuple[str, ...] = ()
    error: str = ""
    user: User = User()


class TokenReview(_Object, frozen=True):
    """The API server's answer to a token."""

    status: TokenReviewStatus = TokenReviewStatus()


def with_condition(conditions: tuple[Condition, ...], new: Condition, wall: float) -> tuple[Condition, ...]:
    """The conditions with `new` in the place of its kind. `wall`: now, which is its time of transition if its status changed."""
    old = next((each for each in conditions if each.type == new.type), None)
    time = old.last_transition_time if old and old.status == new.status else timestamp(wall)
    return (*(each for each in conditions if each.type != new.type), msgspec.structs.replace(new, last_transition_time=time))


def condition(snapshot: ModelSnapshot, kind: str, holds: bool, reason: str, reason_not: str, message: str) -> Condition:
    """A condition of the object as it is now. `message`: why it does not hold."""
    status, why = ("True", reason) if holds else ("False", reason_not)
    text = message if not holds or reason == "Resident" else ""
    return Condition(kind, status, why, text, observed_generation=snapshot.metadata.generation)
