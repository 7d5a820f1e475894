"""The members of a Service, from its EndpointSlices: known from the API server's watch the moment they appear."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import msgspec

from scaler.fleet.addresses import Addresses
from scaler.kubernetes.resources import Metadata
from zerowake_shared.address import Address

SERVICE_LABEL = "kubernetes.io/service-name"


class EndpointConditions(msgspec.Struct, frozen=True):
    """Whether the pod answers, as its kubelet says, or its node's end does; absent: it does."""

    serving: bool | None = None


class SliceEndpoint(msgspec.Struct, frozen=True):
    """One member of a Service: all addresses of one pod."""

    addresses: tuple[str, ...] = ()
    conditions: EndpointConditions = EndpointConditions()


class EndpointSlice(msgspec.Struct, frozen=True, rename="camel"):
    """What is read of discovery.k8s.io/v1 EndpointSlice."""

    metadata: Metadata
    endpoints: tuple[SliceEndpoint, ...] | None = None


class Slices(Protocol):
    """A live copy of a Service's EndpointSlices: an Informer of them."""

    def __iter__(self) -> Iterator[EndpointSlice]: ...

    def on_change(self, callback: Callable[[EndpointSlice | None, EndpointSlice | None], None]) -> None: ...


def of_service(slices: Slices, port: int) -> Addresses:
    """Every endpoint of the Service, ready or not: one that is going away may still have something to say."""
    addresses = Addresses()

    def collect(_old: EndpointSlice | None, _new: EndpointSlice | None) -> None:
        members = [endpoint for each in slices for endpoint in each.endpoints or ()]
        unserving = [endpoint for endpoint in members if endpoint.conditions.serving is False]
        addresses.set(_of(members, port), _of(unserving, port))

    slices.on_change(collect)
    return addresses


def _of(members: Iterable[SliceEndpoint], port: int) -> Iterator[str]:
    return (str(Address(address, port)) for member in members for address in member.addresses)
