"""A node's agent as the scaler sees it: its Watch stream, and what it is asked to stage and to remove."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from zerowake_proto import agent_pb2, agent_pb2_grpc


class Agent(agent_pb2_grpc.AgentServicer):
    """One that does at once what it is asked, or refuses with `refuse`. refuse_above: whatever is higher it has no room for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.residencies: dict[tuple[str, str], agent_pb2.Residency] = {}
        self.staged: list[agent_pb2.StageRequest] = []
        self.unstaged: list[agent_pb2.UnstageRequest] = []
        self.pinned: list[agent_pb2.PinRequest] = []
        self.demoted: list[agent_pb2.DemoteRequest] = []
        self.wanted = False  # what is to sleep is in use just now
        self.woken: list[agent_pb2.WakeRequest] = []
        self.told: dict[str, Any] = {}  # the metadata of the last one
        self.replicas: dict[str, agent_pb2.Replica] = {}
        self.asleep_on: dict[str, grpc.StatusCode] = {}  # replicas that are not woken, and how that is said
        self.refuse: grpc.StatusCode | None = None
        self.refuse_above: agent_pb2.Rung = agent_pb2.RUNG_PARKED
        self.peer_port = 0
        self.pushed: list[agent_pb2.PushRequest] = []
        self.store_fails: tuple[str, str] | None = None  # reason and words of a store that cannot be used
        self.asked: list[agent_pb2.FindRequest] = []
        self.find_fails: tuple[str, str] | None = ("not-in-store", "no such snapshot there")
        self.find_opens = asyncio.Event()  # until then it is looked for
        self.find_opens.set()
        self.in_store: agent_pb2.FindResponse | None = None  # what a store has, once finding does not fail
        self.complaints: list[str] = []  # of sources, in each answer to Stage
        self.store_opens = asyncio.Event()  # until then what goes there or comes from there is under way
        self.store_opens.set()
        self.disk_to_memory = 0.0  # bytes a second
        self.staged_limit: int | None = None  # bytes of images that its memory may take, and those that do count then as its stream begins
        self.weights_room: int | None = None  # bytes
        self.gpu = 0  # bytes of its one GPU that are free; 0: it has none
        self._streams: list[asyncio.Queue[agent_pb2.NodeUpdate]] = []

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Yields the address."""
        server = grpc.aio.server()
        agent_pb2_grpc.add_AgentServicer_to_server(self, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(None)

    def has(
        self,
        namespace: str,
        name: str,
        digest: str,
        *,
        rung: agent_pb2.Rung = agent_pb2.RUNG_MEMORY,
        unusable: str = "",
        size: int = 1000,
        weights: int = 0,
        gpu: int = 0,
        cold: float = 0.0,
        managed: bool = False,
    ) -> None:
        reference = agent_pb2.SnapshotRef(namespace=namespace, name=name, digest=digest)
        residency = agent_pb2.Residency(snapshot=reference, rung=rung, image_bytes=size, unusable_reason=unusable, cold_seconds=cold)
        residency.managed, residency.weights_bytes = managed, weights
        residency.weights_rung = agent_pb2.WEIGHTS_RUNG_GPU if rung >= agent_pb2.RUNG_MEMORY else agent_pb2.WEIGHTS_RUNG_DISK
        residency.gpu_bytes.extend([gpu] if gpu else [])
        before = self.residencies.get((namespace, name))
        if before is not None and before.snapshot.digest == digest:
            residency.pinned = before.pinned
        self.residencies[namespace, name] = residency
        self._tell(residency)

    def loses(self, namespace: str, name: str) -> None:
        lost = self.residencies.pop((namespace, name))
        self._tell(agent_pb2.Residency(snapshot=lost.snapshot, rung=agent_pb2.RUNG_ABSENT))

    def runs(self, name: str, model: str, namespace: str = "ns", asleep: agent_pb2.Rung = agent_pb2.RUNG_UNSPECIFIED) -> None:
        """A replica, in a pod; `asleep`: the rung on which it sleeps there."""
        self.replicas[name] = agent_pb2.Replica(
            id=name,
            model=model,
            snapshot=agent_pb2.SnapshotRef(namespace=namespace),
            state=agent_pb2.REPLICA_IDLE if asleep else agent_pb2.REPLICA_READY,
            origin=agent_pb2.ORIGIN_PARKED,
            endpoint=agent_pb2.Endpoint(host="127.0.0.1", port=1),
            rung=asleep,
            phases=[agent_pb2.Phase(name="image.wake", seconds=0.25)],
        )
        self.says(agent_pb2.NodeUpdate(replica=self.replicas[name]))

    def takes_gpu(self, free: int) -> None:
        """Others have taken of its GPU, or given back: so much is free now."""
        self.gpu = free
        self.says(self._itself())

    def _itself(self) -> agent_pb2.NodeUpdate:
        here = agent_pb2.NodeUpdate(node=agent_pb2.Node(name=self.name, memory_free_bytes=1 << 34, peer_port=self.peer_port))
        here.node.bandwidths.disk_to_memory = self.disk_to_memory
        if self.staged_limit is not None:
            here.node.staged_limit_bytes = self.staged_limit
            in_memory = [each.image_bytes for each in self.residencies.values() if each.rung >= agent_pb2.RUNG_MEMORY]
            here.node.staged_bytes = sum(in_memory)
        if self.weights_room is not None:
            here.node.weights_room_bytes = self.weights_room
        if self.gpu:
            here.node.gpus.add(uuid="gpu", total_bytes=80 << 30, free_bytes=self.gpu)
        return here

    async def Watch(self, request: agent_pb2.WatchRequest, context: Any) -> AsyncIterator[agent_pb2.NodeUpdate]:
        queue: asyncio.Queue[agent_pb2.NodeUpdate] = asyncio.Queue()
        self._streams.append(queue)  # before the first part: nothing falls between it and the changes
        yield self._itself()
        for residency in list(self.residencies.values()):
            yield agent_pb2.NodeUpdate(residency=residency)
        for replica in list(self.replicas.values()):
            yield agent_pb2.NodeUpdate(replica=replica)
        yield agent_pb2.NodeUpdate(synced=True)
        try:
            while True:
                try:
                    yield await asyncio.wait_for(queue.get(), 2.0)
                except TimeoutError:
                    yield self._itself()
        finally:
            self._streams.remove(queue)

    async def Stage(self, request: agent_pb2.StageRequest, context: Any) -> agent_pb2.StageResponse:
        self.staged.append(request)
        if self.refuse is not None:
            await context.abort(self.refuse, "no room for it")
        await self._check_room(request.rung, context)
        if request.stores and (request.snapshot.namespace, request.snapshot.name) not in self.residencies:
            await self._at_store(context)
        name = request.snapshot
        weights = here.weights_bytes if (here := self.residencies.get((name.namespace, name.name))) else 0
        self.has(name.namespace, name.name, name.digest, rung=request.rung, weights=weights)
        return agent_pb2.StageResponse(residency=self.residencies[name.namespace, name.name], seconds=0.1, complaints=self.complaints)

    async def Pin(self, request: agent_pb2.PinRequest, context: Any) -> agent_pb2.PinResponse:
        self.pinned.append(request)
        if self.refuse is not None:
            await context.abort(self.refuse, "its disk is read-only")
        residency = self.residencies[request.snapshot.namespace, request.snapshot.name]
        residency.pinned = request.rung
        self._tell(residency)
        return agent_pb2.PinResponse(residency=residency)

    async def Push(self, request: agent_pb2.PushRequest, context: Any) -> AsyncIterator[agent_pb2.TransferUpdate]:
        self.pushed.append(request)
        yield agent_pb2.TransferUpdate(progress=agent_pb2.TransferProgress(total_bytes=1000))
        await self._at_store(context)
        yield agent_pb2.TransferUpdate(result=agent_pb2.TransferResult(snapshot=request.snapshot, seconds=0.1))

    async def Find(self, request: agent_pb2.FindRequest, context: Any) -> agent_pb2.FindResponse:
        self.asked.append(request)
        await self.find_opens.wait()
        if self.find_fails:
            context.set_trailing_metadata((("zerowake-reason", self.find_fails[0]),))
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.find_fails[1])
        assert self.in_store
        return self.in_store

    async def _at_store(self, context: Any) -> None:
        await self.store_opens.wait()
        if self.store_fails:
            context.set_trailing_metadata((("zerowake-reason", self.store_fails[0]),))
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.store_fails[1])

    async def Demote(self, request: agent_pb2.DemoteRequest, context: Any) -> agent_pb2.DemoteResponse:
        self.demoted.append(request)
        if self.wanted:
            context.set_trailing_metadata((("zerowake-reason", "wanted"),))
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "a request has just come")
        await self._check_room(request.rung, context)
        if replica := self.replicas.get(request.replica_id):
            self.runs(replica.id, replica.model, replica.snapshot.namespace, request.rung)
        return agent_pb2.DemoteResponse()

    async def Wake(self, request: agent_pb2.WakeRequest, context: Any) -> agent_pb2.WakeResponse:
        self.woken.append(request)
        self.told = dict(context.invocation_metadata())
        if code := self.asleep_on.get(request.replica_id):
            await context.abort(code, "its GPU is full")
        replica = self.replicas[request.replica_id]
        self.runs(replica.id, replica.model, replica.snapshot.namespace)
        return agent_pb2.WakeResponse(replica=self.replicas[replica.id])

    async def _check_room(self, rung: agent_pb2.Rung, context: Any) -> None:
        if rung > self.refuse_above:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room for it")

    async def Unstage(self, request: agent_pb2.UnstageRequest, context: Any) -> agent_pb2.UnstageResponse:
        self.unstaged.append(request)
        if self.refuse is not None:
            await context.abort(self.refuse, "a restore is under way")
        key = (request.snapshot.namespace, request.snapshot.name)
        if key not in self.residencies:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such snapshot")
        if request.rung == agent_pb2.RUNG_ABSENT:
            self.loses(*key)
            return agent_pb2.UnstageResponse()
        here = self.residencies[key]
        self.has(*key, request.snapshot.digest, rung=request.rung, size=here.image_bytes, weights=here.weights_bytes)
        return agent_pb2.UnstageResponse(residency=self.residencies[key])

    def says(self, update: agent_pb2.NodeUpdate) -> None:
        for queue in self._streams:
            queue.put_nowait(update)

    def _tell(self, residency: agent_pb2.Residency) -> None:
        self.says(agent_pb2.NodeUpdate(residency=residency))
