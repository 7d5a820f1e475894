"""The file that `zerowake serve` reads: one YAML, checked whole before anything is started. On Kubernetes the chart writes it.

There are no models in it: those are declared in the cluster. Every port has the number that the chart's Services and policies name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from scaler.kubernetes.pod_patch import NodeSetup
from scaler.local.byte_sizes import byte_size
from scaler.local.config import Address, Goal, KedaSection, Section, read
from zerowake_shared import address
from zerowake_shared.tls import TlsFiles


def _reachable(value: str) -> str:
    address.Address.parse(value)
    return value


Peer = Annotated[str, AfterValidator(_reachable)]
QuotaOf = Annotated[str, Field(pattern=r"^(\*|[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)$")]  # a namespace; *: each that is not named
Quota = Annotated[int, BeforeValidator(lambda value: int(byte_size(value))), Field(ge=0)]


class MutualTlsSection(Section):
    """Certificates by which replicas of the scaler and agents know each other, both sides from the same authority."""

    certificate: Path
    key: Path
    authority: Path

    @property
    def files(self) -> TlsFiles:
        return TlsFiles(self.certificate, self.key, self.authority)


class WebhookSection(Section):
    """Where the admission webhook listens, and with which certificate."""

    listen: Address
    certificate: Path
    key: Path

    @property
    def files(self) -> TlsFiles:
        return TlsFiles(self.certificate, self.key)


class _Members(Section):
    """Programs that are many: the endpoints of a Service in our own namespace, or names that are looked up."""

    service: str = ""
    addresses: tuple[Peer, ...] = ()

    @model_validator(mode="after")
    def _one_way(self) -> _Members:
        if bool(self.service) == bool(self.addresses):
            raise ValueError("give either service (the name of a Service in the scaler's namespace) or addresses (a list of HOST:PORT)")
        return self


class PeersSection(_Members):
    """The other replicas of the scaler. They listen on the same port as this one."""

    listen: Address

    @property
    def member_port(self) -> int:
        return address.Address.to_listen(self.listen).port


class AgentsSection(_Members):
    """The restore agents. node_selector, gpumem: how their DaemonSet was deployed, which the webhook has to know.
    orphan_grace_seconds: how long nobody has asked for what a node has before it is removed there (orphans.py)."""

    port: Annotated[int, Field(gt=0, lt=65536)] = 9446
    node_selector: dict[str, str] = Field(default_factory=dict)
    gpumem: bool = False
    orphan_grace_seconds: Annotated[float, Field(gt=0)] = 600.0

    @property
    def member_port(self) -> int:
        return self.port

    @property
    def setup(self) -> NodeSetup:
        return NodeSetup(self.node_selector, self.gpumem)


class SourcesSection(Section):
    """hosts: that sources of demand of every namespace may name, beside Services of their own."""

    hosts: tuple[Annotated[str, Field(min_length=1)], ...] = ()


class PushSection(Section):
    """Where ServiceAccounts of models' namespaces tell of demand, by POST /demand."""

    listen: Address


class ServeConfig(Section):
    """The whole file."""

    namespace: str  # the one that this runs in: Services and the lease are looked for there
    listen: Address = "0.0.0.0:8080"
    metrics: Address = "0.0.0.0:9090"
    page: bool = True  # at the address of metrics
    keda: KedaSection
    peers: PeersSection | None = None
    agents: AgentsSection
    webhook: WebhookSection | None = None
    tls: MutualTlsSection | None = None
    sources: SourcesSection = SourcesSection()
    push: PushSection | None = None
    objective: Goal = "mean"
    memory_quotas: dict[QuotaOf, Quota] = Field(default_factory=dict)  # of nodes' memory, by namespace (plan/quotas.py)
    drain_seconds: Annotated[float, Field(ge=0)] = 30.0

    @property
    def addresses(self) -> list[tuple[str, str]]:
        """Who listens, and where."""
        found = [("the gateway (listen)", self.listen), ("the metrics' server (metrics)", self.metrics)]
        found.append(("the external scaler (keda.listen)", self.keda.listen))
        found += [("what is posted of demand (push.listen)", self.push.listen)] if self.push else []
        found += [("the service for peers (peers.listen)", self.peers.listen)] if self.peers else []
        return found + ([("the webhook (webhook.listen)", self.webhook.listen)] if self.webhook else [])


def load(path: Path) -> ServeConfig:
    """Raises: BadConfig: it cannot be read, is no YAML, or a field is unknown or of no use."""
    return read(path, ServeConfig)
