"""Where the hosts are that users' sources of demand name (`spec.sources[].url`).

The scaler asks from its own place in the network, which may reach what a tenant does not: other tenants' pods, the cloud's metadata, what
listens on its own node. So a tenant's URL leads to Services of his own namespace alone, and the addresses of these are the API server's to
say, at each connection: a name that is looked up in DNS can be anything by the time it is connected to, and a Service of the type
ExternalName leads wherever its owner likes. A host that the administrator has named is looked up as any other.
Rejected: DNS and a look at the answer (which addresses are whose, no scaler knows); permitting what the network policies of the scaler
permit (they would have to know every tenant's databases).
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Collection, Sequence

from scaler.kubernetes.resources import SERVICES, Service
from scaler.sources.source import SourceError
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.errors import ClusterError, NotFound

_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_SERVICE = re.compile(rf"({_LABEL})\.({_LABEL})\.svc(?:\.{_LABEL})*")


def service_of(host: str) -> tuple[str, str] | None:
    """The namespace and name of the Service that is called so in the cluster's DNS, with its domain or without; None: none could be."""
    found = _SERVICE.fullmatch(host)
    return (found[2], found[1]) if found else None


class ServiceLookup:
    """hosts: those that the administrator has named, in lower case."""

    def __init__(self, cluster: Cluster, hosts: Collection[str]) -> None:
        self._cluster = cluster
        self._hosts = hosts

    async def addresses(self, host: str) -> Sequence[str]:
        """Of what may be asked. Raises: SourceError."""
        if host.lower() in self._hosts:
            try:
                found = await asyncio.get_running_loop().getaddrinfo(host.lower(), None, type=socket.SOCK_STREAM)
            except OSError as error:
                raise SourceError(f"the host {host} cannot be found: {error.strerror or error}") from None
            return [str(each[4][0]) for each in found]
        named = service_of(host.lower())
        if named is None:
            raise SourceError(f"{host} is no Service of this cluster")
        try:
            service = await self._cluster.get(SERVICES, *named, Service)
        except NotFound:
            raise SourceError(f"there is no Service {named[1]} in namespace {named[0]}") from None
        except ClusterError as error:
            raise SourceError(f"where Service {named[1]} of namespace {named[0]} is cannot be found out: {error}") from None
        if service.spec.type == "ExternalName":
            raise SourceError(
                f"Service {named[1]} is of the type ExternalName, which leads out of its namespace: name the host itself, and have an"
                " administrator add it to the chart's value scaler.sources.hosts"
            )
        try:
            return [str(ipaddress.ip_address(service.spec.cluster_ip))]
        except ValueError:
            raise SourceError(
                f"Service {named[1]} has no address of its own (clusterIP): make one beside it that is not headless"
            ) from None
