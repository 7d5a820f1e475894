"""What drivers of dynamic resource allocation (DRA) say of the devices of this node: their UUIDs, from the API's ResourceSlices.

They are read when a device is asked for that is not known yet, and otherwise once a minute at most: a cluster without such claims is never
asked, and one without this API (before Kubernetes 1.34) never hears of it. What is known outlives an API server that does not answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import msgspec

from restore_agent.kubernetes.pod_resources import Device
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.errors import ClusterError, Expired
from zerowake_shared.kubernetes.resource import Resource

RESOURCE_SLICES = Resource("resource.k8s.io/v1", "ResourceSlice", "resourceslices")
_FRESH_SECONDS = 60.0
_LOG = logging.getLogger("zerowake.agent")

_Key = tuple[str, str, str]  # driver, pool, device


class _Attribute(msgspec.Struct):
    """Its value, where that is a text."""

    string: str | None = None


class _Device(msgspec.Struct):
    """One that can be claimed."""

    name: str
    attributes: dict[str, _Attribute] = {}


class _Pool(msgspec.Struct):
    """What a driver has published together: it begins anew with a greater generation."""

    name: str
    generation: int = 0


class _Spec(msgspec.Struct):
    """Some devices of a pool."""

    driver: str
    pool: _Pool
    devices: list[_Device] = []


class _Slice(msgspec.Struct):
    """The object that holds it."""

    spec: _Spec


class ResourceSlices:
    """Of one node."""

    def __init__(self, cluster: Cluster, node: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self._cluster = cluster
        self._node = node
        self._clock = clock
        self._uuids: dict[_Key, str] = {}
        self._read = float("-inf")

    async def uuids(self, devices: Iterable[Device]) -> Mapping[Device, str]:
        """Those of devices of claims whose drivers publish one: of a GPU, or of a slice of it (MIG)."""
        wanted = {(each.source, each.pool, each.name): each for each in devices if each.pool}
        age = self._clock.now() - self._read
        if wanted and (age > _FRESH_SECONDS or (age > 1.0 and not wanted.keys() <= self._uuids.keys())):
            await self._look()
        return {device: self._uuids[key] for key, device in wanted.items() if self._uuids.get(key)}

    async def _look(self) -> None:
        self._read = self._clock.now()
        try:
            found = await self._slices()
        except (ClusterError, Expired, msgspec.MsgspecError) as error:
            _LOG.warning("which GPUs are meant by claims is not known anew (ResourceSlices of node %s): %s", self._node, error)
            return
        # While a pool is published anew its old slices are there, too.
        newest: dict[tuple[str, str], int] = {}
        for each in found:
            pool = (each.driver, each.pool.name)
            newest[pool] = max(each.pool.generation, newest.get(pool, 0))
        self._uuids = {
            (each.driver, each.pool.name, device.name): _uuid(device)
            for each in found
            for device in each.devices
            if each.pool.generation == newest[each.driver, each.pool.name]
        }

    async def _slices(self) -> list[_Spec]:
        """Raises ClusterError, Expired, MsgspecError."""
        query, found = {"fieldSelector": f"spec.nodeName={self._node}"}, list[_Spec]()
        while True:
            page = await self._cluster.page(RESOURCE_SLICES, "", query)
            found += [msgspec.json.decode(raw, type=_Slice).spec for raw in page.items]
            if not page.next:
                return found
            query["continue"] = page.next


def _uuid(device: _Device) -> str:
    """Attributes have a domain where they are not the driver's own."""
    return next((each.string for name, each in device.attributes.items() if name.rpartition("/")[2] == "uuid" and each.string), "")
