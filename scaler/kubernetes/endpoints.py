"""The members of a Service, from its EndpointSlices: known from the API server's watch the moment they appear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from scaler.fleet.addresses import Addresses
from scaler.kubernetes.resources import Metadata
from zerowake_shared.address import Address

SERVICE_LABEL = "kubernetes.io/service-name"


class SliceEndpoint(msgspec.Struct, frozen=True):
    """One member of a Service: all addresses of one pod. Whether it is ready is not read."""

    addresses: tuple[str, ...] = ()


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
        found = (address for each in slices for endpoint in each.endpoints or () for address in endpoint.addresses)
        addresses.set(str(Address(address, port)) for address in found)

    slices.on_change(collect)
    return addresses
