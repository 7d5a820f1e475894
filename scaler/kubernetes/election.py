"""One leader among the replicas of the scaler, by a Lease.

The rules are client-go's: whoever wrote the lease last holds it for 15 s from the moment others see the write, by their own clocks; the
holder writes every 2 s. Here the work is owned too: it is cancelled 10 s after the last write that is known to have counted was *begun*,
so that it has 5 s to end before anybody else can lead. A lease is handed back at the end, and the next replica leads within 2 s.
The official client's leader election was tried and rejected (37.0.2): its asyncio lease can't be created (a type that its own model
refuses), an error of the network leaves the work running without a lease, a call may hang for five minutes, and nothing is handed back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import msgspec

from scaler.kubernetes.resources import LEASES, Metadata
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.errors import ClusterError, Conflict, NotFound
from zerowake_shared.kubernetes.resource import timestamp

log = logging.getLogger(__name__)

_LEASE_SECONDS, _STOP_SECONDS, _RETRY_SECONDS, _CALL_SECONDS = 15, 10.0, 2.0, 3.0


class _Spec(msgspec.Struct, frozen=True, rename="camel"):
    """Who holds a Lease, since when and for how long."""

    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None


class _Lease(msgspec.Struct, frozen=True):
    """coordination.k8s.io/v1 Lease, as far as it is read."""

    metadata: Metadata
    spec: _Spec = _Spec()


async def lead(
    cluster: Cluster, namespace: str, lease: str, identity: str, work: Callable[[], Awaitable[None]], clock: Clock = SYSTEM_CLOCK
) -> None:
    """Runs `work` while this process holds the lease, and again whenever it gets it; until cancelled, then gives the lease back."""
    candidate = _Candidate(cluster, namespace, lease, identity, clock)
    while True:
        written = await candidate.acquire()
        log.info("%s holds the lease %s/%s", identity, namespace, lease)
        working = asyncio.ensure_future(work())
        renewing = asyncio.create_task(candidate.renew(written), name=f"renewing the lease {lease}")
        try:
            await asyncio.wait((working, renewing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            # In this order: nobody else can lead before the work has ended.
            working.cancel()
            ended = (await asyncio.gather(working, return_exceptions=True))[0]
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            await candidate.hand_back()
        if isinstance(ended, Exception):
            log.error("the work of the leader failed, the lease %s is given away: %s", lease, ended, exc_info=ended)
        await asyncio.sleep(2 * _RETRY_SECONDS)  # another replica's turn


class _Candidate:
    """One replica that tries to hold the lease."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, identity: str, clock: Clock) -> None:
        self._clock = clock
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._seen: _Lease | None = None
        self._changed = 0.0  # the moment at which the lease was first seen as it is in `_seen`

    async def acquire(self) -> float:
        """Waits for the lease. Returns the moment at which the write that got it was begun."""
        while True:
            begun = self._clock.now()
            if await self._try(begun):
                return begun
            await asyncio.sleep(_RETRY_SECONDS)

    async def renew(self, written: float) -> None:
        """Keeps the lease; returns when it may be lost."""
        while True:
            await asyncio.sleep(_RETRY_SECONDS)
            begun = self._clock.now()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(written + _STOP_SECONDS - begun):
                    if await self._try(begun):
                        written = begun
            if self._seen is not None and self._seen.spec.holder_identity != self._identity:
                log.warning("the lease %s is held by %s now", self._name, self._seen.spec.holder_identity)
                return
            if self._clock.now() >= written + _STOP_SECONDS:
                log.warning("the lease %s could not be renewed for %.0f s: no longer leading", self._name, _STOP_SECONDS)
                return

    async def hand_back(self) -> None:
        """Best effort: a lease that is not handed back runs out."""
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                lease = await self._cluster.get(LEASES, self._namespace, self._name, _Lease)
                if lease.spec.holder_identity == self._identity:
                    await self._write(lease, None)
        except (ClusterError, TimeoutError) as error:
            log.warning("the lease %s is left to run out: %s", self._name, error or "no answer")

    async def _try(self, now: float) -> bool:
        """Whether this process holds the lease after one try to write it."""
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                try:
                    lease = await self._cluster.get(LEASES, self._namespace, self._name, _Lease)
                except NotFound:
                    await self._cluster.create(LEASES, self._namespace, {"metadata": {"name": self._name}, "spec": {}})
                    return False  # the next try writes it, as any other
                if lease != self._seen:
                    self._seen, self._changed = lease, now
                holder, duration = lease.spec.holder_identity, lease.spec.lease_duration_seconds or _LEASE_SECONDS
                if holder and holder != self._identity and now < self._changed + duration:
                    return False
                self._seen = await self._write(lease, self._identity)
                self._changed = now
                return True
        except Conflict:
            return False  # somebody else was faster; the next look says who
        except (ClusterError, TimeoutError) as error:
            log.warning("the lease %s could not be read or written: %s", self._name, error or f"no answer in {_CALL_SECONDS} s")
            return False

    async def _write(self, lease: _Lease, holder: str | None) -> _Lease:
        now = timestamp(self._clock.wall(), "microseconds")
        spec: dict[str, object] = {"holderIdentity": holder, "renewTime": now, "leaseDurationSeconds": _LEASE_SECONDS}
        if holder and holder != lease.spec.holder_identity:
            spec |= {"acquireTime": now, "leaseTransitions": (lease.spec.lease_transitions or 0) + 1}
        body = {"metadata": {"resourceVersion": lease.metadata.resource_version}, "spec": spec}
        return msgspec.json.decode(await self._cluster.patch(LEASES, self._namespace, self._name, body), type=_Lease)
