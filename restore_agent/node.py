"""One node: its store, ladder, replicas and sequences, wired together; and the stream of everything that changes on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from restore_agent import metrics
from restore_agent.capture import Captured, Capturer, CaptureRequest, Progress
from restore_agent.criu import Criu, CriuError
from restore_agent.cuda import Cuda, CudaError
from restore_agent.headroom import Headroom
from restore_agent.hugepages import HugePages
from restore_agent.ladder import Ladder
from restore_agent.manifest import EngineRecord, GpuRecord
from restore_agent.phases import Phases
from restore_agent.replicas import Origin, Replica, Replicas
from restore_agent.restore import RestoreFailed, Restorer
from restore_agent.sandbox import Sandbox, SandboxError
from restore_agent.store import Snapshot, Store
from restore_agent.weights import Weights, layout_file

_KDAT = "criu.kdat"  # CRIU's kernel probe, kept in memory: it must not outlive a boot
_LOG = logging.getLogger("thaw.agent")


class Removed:
    """A snapshot that is no longer on this node."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot


Change = Snapshot | Removed | Replica


class Node:
    """Use `async with Node.open(name, state, memory)`."""

    def __init__(self, name: str, store: Store, memory: Path, weights: Weights, criu: Criu | CriuError) -> None:
        self.name = name
        self.weights = weights
        self.store = store
        self.criu = criu if isinstance(criu, Criu) else None
        why = "" if isinstance(criu, Criu) else str(criu)
        kdat = memory / _KDAT
        self._listeners: set[asyncio.Queue[Change]] = set()
        try:
            cuda = Cuda.find()
        except CudaError as error:
            cuda = None
            _LOG.warning("snapshots with GPU state cannot be taken or restored here: %s", error)
        gpus = GpuRecord(**vars(cuda.gpus())) if cuda else None
        self.headroom = Headroom()
        self.ladder = Ladder(store, memory, self.criu.version if self.criu else "0", gpus, self.headroom, self._changed)
        self.restorer = Restorer(self.criu, why, kdat, self.ladder, HugePages(store.state), self.headroom, cuda, self.weights)
        self.replicas = Replicas(self._changed)
        self._why_no_criu = why
        self._capturer = Capturer(self.criu, cuda, self.weights, kdat, store, self.ladder, self.restorer) if self.criu else None

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, name: str, state: Path, memory: Path, gpumem: Path) -> AsyncIterator[Node]:
        """`state`: the snapshots' folder; `memory`: a tmpfs; `gpumem`: its server's socket. Raises StoreBusy, OSError."""
        store = await asyncio.to_thread(Store, state)
        try:
            node = cls(name, store, memory, Weights(gpumem), await _working_criu(memory / _KDAT))
            try:
                yield node
            finally:
                await node.replicas.close()
                await node.ladder.close()
                await node.headroom.close()
        finally:
            store.close()

    async def restore(
        self, model: str, snapshot: Snapshot | RestoreFailed | None, cold: EngineRecord | None, activation: str, phases: Phases
    ) -> tuple[Replica, RestoreFailed | None]:
        """One ready replica, restored or, where that is impossible, started: by `cold`, else by the manifest; and why it was not restored.

        Raises:
            RestoreFailed: and there is neither.
            EngineError, SandboxError: it could not be started either.
        """
        failure = snapshot if isinstance(snapshot, RestoreFailed) else None
        if isinstance(snapshot, Snapshot):
            try:
                engine = await self.restorer.restore(snapshot, phases)
                replica = self.replicas.add(model, snapshot, Origin.RESTORED, engine, phases)
                metrics.restored(model, replica.phases)
                self._log(activation, replica, phases)
                return replica, None
            except RestoreFailed as error:
                failure = error
        if failure:
            metrics.fell_back(model, failure.reason)
            _LOG.warning("activation %s: %s is not restored (%s): %s", activation or "-", model, failure.reason, failure)
            if cold is None and isinstance(snapshot, Snapshot):
                cold = snapshot.manifest.engine
            if cold is None:
                raise failure
        assert cold is not None
        engine = await self.restorer.start_cold(cold, model, phases)
        replica = self.replicas.add(model, None, Origin.COLD, engine, phases, detail=str(failure or ""))
        metrics.started_cold(model)
        self._log(activation, replica, phases)
        return replica, failure

    async def capture(self, request: CaptureRequest, progress: Progress, phases: Phases) -> Captured:
        """See Capturer.capture. Raises also CriuError where there is no CRIU."""
        if self._capturer is None:
            raise CriuError(self._why_no_criu)
        captured = await self._capturer.capture(request, progress, phases)
        self._changed(captured.snapshot)
        return captured

    async def stage(self, snapshot: Snapshot) -> float:
        """Image and weights into memory, at the same time; returns the seconds. Raises what the ladder does, WeightsError."""
        begin = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.ladder.stage(snapshot))
            for record in snapshot.manifest.weights:
                layout = self.store.read_file(snapshot, layout_file(record), snapshot.manifest.files[layout_file(record)])
                group.create_task(self.weights.stage(record, layout))
        return time.monotonic() - begin

    async def remove(self, snapshot: Snapshot) -> None:
        """absent: out of memory, off the disk. Raises NotFound."""
        self.ladder.unstage(snapshot.digest)
        await asyncio.to_thread(self.store.remove, snapshot.manifest.namespace, snapshot.manifest.name)
        self._changed(Removed(snapshot))

    @contextlib.contextmanager
    def changes(self) -> Iterator[asyncio.Queue[Change]]:
        """A queue that hears of every change from now on."""
        queue: asyncio.Queue[Change] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            yield queue
        finally:
            self._listeners.discard(queue)

    def _changed(self, change: Change) -> None:
        metrics.replicas_are(self.replicas)
        for queue in self._listeners:
            queue.put_nowait(change)

    def _log(self, activation: str, replica: Replica, phases: Phases) -> None:
        parts = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in replica.phases)
        _LOG.info("activation %s: replica %s %s in %.3f s (%s)", activation or "-", replica.id, replica.origin.value, phases.total, parts)


async def _working_criu(kdat: Path) -> Criu | CriuError:
    try:
        if os.geteuid() != 0:
            raise CriuError("restoring needs root, for CRIU and namespaces; start the agent with sudo")
        criu = await asyncio.to_thread(Criu.find)
        async with await Sandbox.create(kdat) as sandbox:
            await criu.probe(sandbox, kdat)
        return criu
    except (CriuError, SandboxError) as error:
        _LOG.warning("engines are started cold: %s", error)
        return CriuError(str(error))
