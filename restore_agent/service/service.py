"""The agent's gRPC service (proto/agent.proto): messages in, calls on the node, messages and status codes out.

A call is idempotent by its request_id: the work belongs to the id, not to the connection, and a second call with it joins or gets the same
answer. When every caller of an unfinished piece of work has gone, it is cancelled and undone.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from zerowake_proto import agent_pb2, agent_pb2_grpc

from restore_agent.errors import FAILURES
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.node import Node
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.replicas import Origin
from restore_agent.service import messages
from restore_agent.service.requests import Requests, ended
from restore_agent.service.stream import Stream
from restore_agent.snapshots.catalog import NotFound, Unreadable
from restore_agent.snapshots.catalog import Snapshot as StoredSnapshot
from restore_agent.snapshots.compatibility import Incompatible
from restore_agent.snapshots.manifest import Manifest
from restore_agent.snapshots.unusable import Unusable
from restore_agent.transfer.complaints import Complaints
from restore_agent.transfer.finding import Found
from restore_agent.transfer.progress import Progress

_LOG = logging.getLogger("zerowake.agent")
_TELL_SECONDS = 0.2  # between two words about a transfer
_Context = grpc.aio.ServicerContext[Any, Any]
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class AgentService(agent_pb2_grpc.AgentServicer):
    """The agent's methods over one node. Those that do work answer by `Requests.once`."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._requests = Requests()

    async def Stage(self, request: agent_pb2.StageRequest, context: _Context) -> agent_pb2.StageResponse:
        async def stage() -> agent_pb2.StageResponse:
            complaints = Complaints()
            snapshot = await self._here_or_fetched(request, complaints)
            seconds = 0.0
            if request.rung == agent_pb2.RUNG_PARKED:
                seconds = await self._node.park(snapshot, request.keep_seconds, request.standby_seconds)
            elif request.rung == agent_pb2.RUNG_STANDBY:
                seconds = await self._node.stand_by(snapshot, request.keep_seconds)
            elif request.rung == agent_pb2.RUNG_MEMORY:
                seconds = await self._node.stage(snapshot, urgent=request.urgent)
            elif request.rung != agent_pb2.RUNG_DISK:
                raise messages.InvalidField("rung: a snapshot can be staged to RUNG_DISK, RUNG_MEMORY, RUNG_STANDBY and RUNG_PARKED")
            await self._node.check_named(snapshot)
            residency = messages.residency(self._node, snapshot)
            return agent_pb2.StageResponse(residency=residency, seconds=seconds, complaints=complaints.texts)

        return await self._requests.once("stage", request.request_id, stage, context)

    async def Unstage(self, request: agent_pb2.UnstageRequest, context: _Context) -> agent_pb2.UnstageResponse:
        async def unstage() -> agent_pb2.UnstageResponse:
            if request.rung == agent_pb2.RUNG_ABSENT:
                return agent_pb2.UnstageResponse(residency=await self._remove(request.snapshot, orphan=request.orphan))
            snapshot = await self._snapshot(request.snapshot)
            if request.rung == agent_pb2.RUNG_STANDBY:
                await self._node.rungs.unpark(snapshot)
                return agent_pb2.UnstageResponse(residency=messages.residency(self._node, snapshot))
            if request.rung in (agent_pb2.RUNG_DISK, agent_pb2.RUNG_MEMORY):
                await self._node.standbys.drop(snapshot.digest)
                if request.rung == agent_pb2.RUNG_DISK:
                    self._node.staging.unstage(snapshot.digest)
                    if request.weights:
                        await self._node.returning.let_go(snapshot)
                return agent_pb2.UnstageResponse(residency=messages.residency(self._node, snapshot))
            raise messages.InvalidField("rung: a snapshot can be unstaged to RUNG_STANDBY, RUNG_MEMORY, RUNG_DISK and RUNG_ABSENT")

        return await self._requests.once("unstage", request.request_id, unstage, context)

    async def Pin(self, request: agent_pb2.PinRequest, context: _Context) -> agent_pb2.PinResponse:
        async def pin() -> agent_pb2.PinResponse:
            wanted, snapshot = messages.pin(request.rung), await self._snapshot(request.snapshot)
            await asyncio.to_thread(self._node.store.pins.put, snapshot.digest, wanted)
            self._node.changes.tell(snapshot)
            return agent_pb2.PinResponse(residency=messages.residency(self._node, snapshot))

        return await self._requests.once("pin", request.request_id, pin, context)

    async def Restore(self, request: agent_pb2.RestoreRequest, context: _Context) -> agent_pb2.RestoreResponse:
        async def restore() -> agent_pb2.RestoreResponse:
            phases = Phases()
            messages.check_model(request.model)
            cold = messages.engine_record(request.cold) if request.HasField("cold") else None
            snapshot: StoredSnapshot | RestoreFailed | None = None
            if request.snapshot.name:
                try:
                    snapshot = await self._snapshot(request.snapshot)
                except (NotFound, Unusable) as error:
                    snapshot = RestoreFailed(error.reason, str(error), await self._unfit(request.snapshot))
            elif cold is None:
                raise messages.InvalidField("snapshot and cold are both absent: one of them says what to start")
            replica, failure = await self._node.restore(request.model, snapshot, cold, _activation(request.activation_id, context), phases)
            return agent_pb2.RestoreResponse(
                replica=messages.replica(replica),
                fallback_reason=failure.reason if failure else "",
                fallback_detail=str(failure or ""),
            )

        return await self._requests.once("restore", request.request_id, restore, context)

    async def Release(self, request: agent_pb2.ReleaseRequest, context: _Context) -> agent_pb2.ReleaseResponse:
        async def release() -> agent_pb2.ReleaseResponse:
            await self._node.release(request.replica_id)
            return agent_pb2.ReleaseResponse()

        return await self._requests.once("release", request.request_id, release, context)

    async def Demote(self, request: agent_pb2.DemoteRequest, context: _Context) -> agent_pb2.DemoteResponse:
        async def demote() -> agent_pb2.DemoteResponse:
            rung = messages.demoted_to(request.rung)
            why = await self._node.demote(request.replica_id, request.keep_seconds, rung, request.standby_seconds)
            return agent_pb2.DemoteResponse(released_reason=why)

        return await self._requests.once("demote", request.request_id, demote, context)

    async def Wake(self, request: agent_pb2.WakeRequest, context: _Context) -> agent_pb2.WakeResponse:
        async def wake() -> agent_pb2.WakeResponse:
            replica = await self._node.wake(request.replica_id, _activation(request.activation_id, context))
            return agent_pb2.WakeResponse(replica=messages.replica(replica))

        return await self._requests.once("wake", request.request_id, wake, context)

    async def Snapshot(self, request: agent_pb2.SnapshotRequest, context: _Context) -> AsyncIterator[agent_pb2.SnapshotUpdate]:
        queue: asyncio.Queue[agent_pb2.SnapshotUpdate] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def progress(phase: str, done: int, total: int) -> None:
            update = agent_pb2.SnapshotUpdate(progress=agent_pb2.SnapshotProgress(phase=phase, done_bytes=done, total_bytes=total))
            loop.call_soon_threadsafe(queue.put_nowait, update)

        async def snapshot() -> agent_pb2.SnapshotUpdate:
            phases = Phases()
            wanted = messages.capture_request(request)
            try:
                captured = await self._node.capture(wanted, progress, phases)
            except FAILURES as error:
                _LOG.warning("no snapshot %s/%s was taken: %s", wanted.namespace, wanted.name, error)
                raise
            replica_id = ""
            if request.keep_serving:
                replica_id = self._node.replicas.add(wanted.model, captured.snapshot, Origin.CAPTURED, captured.source, phases).id
            else:
                await captured.source.place.close()
                captured.source.output.close()
            manifest = captured.snapshot.manifest
            return agent_pb2.SnapshotUpdate(
                result=agent_pb2.SnapshotResult(
                    snapshot=messages.reference(captured.snapshot),
                    image_bytes=manifest.image_bytes,
                    skeleton_bytes=manifest.criu_bytes,
                    phases=messages.phases(phases.done(), phases.spans()),
                    replica_id=replica_id,
                    notes=captured.notes,
                    adapters=[adapter.name for adapter in manifest.adapters],
                )
            )

        async with ended(self._requests.once("snapshot", request.request_id, snapshot, context)) as result:
            while not result.done():
                arrived = asyncio.ensure_future(queue.get())
                await asyncio.wait([arrived, result], return_when=asyncio.FIRST_COMPLETED)
                if arrived.done():
                    yield arrived.result()
                else:
                    arrived.cancel()
            yield result.result()

    async def Push(self, request: agent_pb2.PushRequest, context: _Context) -> AsyncIterator[agent_pb2.TransferUpdate]:
        async def push(progress: Callable[[Progress], None]) -> agent_pb2.SnapshotRef:
            snapshot = await self._snapshot(request.snapshot)
            await self._node.travel.push(snapshot, request.store, progress)
            return messages.reference(snapshot)

        async for update in self._transfer("push", request.request_id, push, context):
            yield update

    async def Pull(self, request: agent_pb2.PullRequest, context: _Context) -> AsyncIterator[agent_pb2.TransferUpdate]:
        complaints = Complaints()

        async def pull(progress: Callable[[Progress], None]) -> agent_pb2.SnapshotRef:
            wanted = request.snapshot
            pulled = await self._node.travel.pull(
                wanted.namespace or "default",
                wanted.name,
                wanted.digest,
                request.stores,
                progress,
                replace=request.replace,
                others=messages.other_agents(request.peers),
                fits=self._node.staging.check_fits if request.fitting else _anywhere,
                complaints=complaints,
                urgent=True,
            )
            if pulled.digest in self._node.store.managed:
                await asyncio.to_thread(self._node.store.managed.remove, pulled.digest)
                self._node.changes.tell(pulled)
            return messages.reference(pulled)

        async for update in self._transfer("pull", request.request_id, pull, context, complaints):
            yield update

    async def Copy(self, request: agent_pb2.CopyRequest, context: _Context) -> AsyncIterator[agent_pb2.TransferUpdate]:
        async def copy(progress: Callable[[Progress], None]) -> agent_pb2.SnapshotRef:
            named = messages.by_name(request.snapshot)
            record = await self._node.travel.copy(named.namespace, named.name, request.source, request.destination, progress)
            return agent_pb2.SnapshotRef(namespace=record.namespace, name=record.name, digest=record.digest)

        async for update in self._transfer("copy", request.request_id, copy, context):
            yield update

    async def Find(self, request: agent_pb2.FindRequest, context: _Context) -> agent_pb2.FindResponse:
        async def find() -> agent_pb2.FindResponse:
            named = messages.by_name(request.snapshot)
            if not request.store:
                return messages.found(await self._found_here(named))
            found = await self._node.travel.find(named.namespace, named.name, request.store, self._node.staging.check_fits)
            return messages.found(found)

        return await self._requests.once("find", request.request_id, find, context)

    async def ListNames(self, request: agent_pb2.ListNamesRequest, context: _Context) -> agent_pb2.ListNamesResponse:
        async def names() -> agent_pb2.ListNamesResponse:
            namespace = request.namespace or "default"
            named = await self._node.travel.names(namespace, request.store)
            return agent_pb2.ListNamesResponse(snapshots=[agent_pb2.SnapshotRef(namespace=namespace, name=name) for name in named])

        return await self._requests.once("names", request.request_id, names, context)

    async def Withdraw(self, request: agent_pb2.WithdrawRequest, context: _Context) -> agent_pb2.WithdrawResponse:
        async def withdraw() -> agent_pb2.WithdrawResponse:
            named = messages.by_name(request.snapshot)
            named.digest = await self._node.travel.withdraw(named.namespace, named.name, request.store)
            return agent_pb2.WithdrawResponse(snapshot=named)

        return await self._requests.once("withdraw", request.request_id, withdraw, context)

    async def Collect(self, request: agent_pb2.CollectRequest, context: _Context) -> agent_pb2.CollectResponse:
        async def collect() -> agent_pb2.CollectResponse:
            grace = messages.grace(request.grace_seconds)
            return messages.collected(await self._node.travel.collect(request.store, grace, dry_run=request.dry_run))

        return await self._requests.once("collect", request.request_id, collect, context)

    async def _transfer(
        self,
        kind: str,
        request_id: str,
        work: Callable[[Callable[[Progress], None]], Awaitable[agent_pb2.SnapshotRef]],
        context: _Context,
        complaints: Complaints | None = None,
    ) -> AsyncIterator[agent_pb2.TransferUpdate]:
        """Tells how far it is now and again, not of each piece; then the result, with the complaints that were collected by then."""
        begin = time.monotonic()
        latest = Progress(0, 0, 0)

        def progress(now: Progress) -> None:
            nonlocal latest
            latest = now

        async def transfer() -> agent_pb2.TransferUpdate:
            snapshot = await work(progress)
            seconds = time.monotonic() - begin
            texts = complaints.texts if complaints else ()
            result = agent_pb2.TransferResult(snapshot=snapshot, progress=messages.progress(latest), seconds=seconds, complaints=texts)
            return agent_pb2.TransferUpdate(result=result)

        async with ended(self._requests.once(kind, request_id, transfer, context)) as result:
            while not (await asyncio.wait([result], timeout=_TELL_SECONDS))[0]:
                yield agent_pb2.TransferUpdate(progress=messages.progress(latest))
            yield result.result()

    async def Watch(self, request: agent_pb2.WatchRequest, context: _Context) -> AsyncIterator[agent_pb2.NodeUpdate]:
        async for update in Stream(self._node).updates():
            yield update

    async def _remove(self, named: agent_pb2.SnapshotRef, *, orphan: bool) -> agent_pb2.Residency:
        """Also what cannot be used, which is whichever snapshot had the name. Raises NotFound, InvalidName; of an orphan also Unusable,
        and NotOrphaned."""
        await asyncio.to_thread(self._node.unfit.remove, named.namespace or "default", named.name)
        if orphan:
            snapshot = await self._snapshot(named)
            await self._node.disk.remove_orphan(snapshot)
            return messages.removed(snapshot, self._node.changes.revision())
        found: StoredSnapshot | Unreadable
        try:
            found = await self._snapshot(named)
        except Unusable as error:
            found = Unreadable(named.namespace or "default", named.name, error)
        await self._node.remove(found)
        return messages.removed(found, self._node.changes.revision())

    async def _found_here(self, named: agent_pb2.SnapshotRef) -> Found:
        """Raises what `_snapshot` does."""
        snapshot = await self._snapshot(named)
        try:
            await asyncio.to_thread(self._node.staging.check_fits, snapshot.manifest)
        except Incompatible as error:
            return Found(snapshot.digest, snapshot.manifest, str(error))
        return Found(snapshot.digest, snapshot.manifest)

    async def _here_or_fetched(self, request: agent_pb2.StageRequest, complaints: Complaints) -> StoredSnapshot:
        """Raises what `_snapshot` and, where it is to be fetched, `Travel.pull` and `Staging.check_fits` do."""
        try:
            return await self._snapshot(request.snapshot)
        except NotFound:
            if not request.peers and not request.stores:
                raise
        wanted, others = request.snapshot, messages.other_agents(request.peers)
        pulled = await self._node.travel.pull(
            *(wanted.namespace or "default", wanted.name, wanted.digest, request.stores, _nobody),
            replace=True,
            others=others,
            fits=self._node.staging.check_fits,
            complaints=complaints,
            urgent=request.urgent,
        )
        if pulled.manifest.is_of_pod:
            await asyncio.to_thread(self._node.store.managed.add, pulled.digest)
            self._node.changes.tell(pulled)
        return pulled

    async def _unfit(self, named: agent_pb2.SnapshotRef) -> StoredSnapshot | None:
        """What there is for a cold start of a snapshot that is not here, as it does not fit."""
        try:
            return await asyncio.to_thread(self._node.unfit.catalog.get, named.namespace or "default", named.name, named.digest)
        except FAILURES:
            return None

    async def _snapshot(self, reference: agent_pb2.SnapshotRef) -> StoredSnapshot:
        return await asyncio.to_thread(self._node.store.get, reference.namespace or "default", reference.name, reference.digest)


def _nobody(progress: Progress) -> None:
    """Hears how far a snapshot is that a Stage waits for."""


def _anywhere(manifest: Manifest) -> None:
    """A snapshot is brought here whether it fits or not: its user may know better, or bring what it lacks."""


def _activation(name: str, context: _Context) -> str:
    """As the node's log names it: with the trace that it is part of, if its caller says so (W3C's trace context, as metadata)."""
    told = dict(context.invocation_metadata() or ()).get("traceparent", "")
    found = _TRACEPARENT.fullmatch(told) if isinstance(told, str) else None
    return f"{name} of trace {found[1]}" if found else name
