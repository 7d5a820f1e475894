"""From a snapshot to a serving replica.

    sandbox  →  CRIU: skeleton  →  (it holds every task)  →  fill pages  →  CRIU lets go  →  restore-complete
       staging into memory, where it does not stand there yet, runs beside all of it

Restoring is an optimisation, never a new way to fail: whatever goes wrong names a reason, and the engine is started cold where the caller
gave its command. The first held request is a restored replica's proof, so it is not asked for its health here.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from restore_agent.bare import Bare
from restore_agent.compatibility import Incompatible
from restore_agent.criu import Criu, CriuError, Worker
from restore_agent.cuda import Cuda, CudaError, NoGpuMemory
from restore_agent.engine import RESTORE_COMPLETE, Engine
from restore_agent.headroom import Headroom
from restore_agent.hugepages import HugePages
from restore_agent.ladder import Bandwidth, Ladder, NoMemory, Staged
from restore_agent.manifest import EngineRecord, Manifest
from restore_agent.output import Output
from restore_agent.pages import FillError
from restore_agent.phases import Phases
from restore_agent.sandbox import Sandbox, SandboxError
from restore_agent.store import Corrupt, NotFound, Snapshot
from restore_agent.weights import Weights, WeightsError, fill_all

TMPFS_ARCHIVE = "tmpfs.tar"  # what the engine keeps in /dev/shm and /run, within a snapshot

# Why a snapshot was not used: keys of the metric `thaw_restore_fallbacks_total`.
_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (NotFound, "not-found"),
    (Corrupt, "corrupt"),
    (Incompatible, "incompatible"),
    (NoMemory, "no-memory"),
    (FillError, "fill-failed"),
    (NoGpuMemory, "no-gpu-memory"),
    (CudaError, "cuda-failed"),
    (WeightsError, "weights-failed"),
    (SandboxError, "sandbox-failed"),
    (CriuError, "criu-failed"),
    (TimeoutError, "timeout"),
    (OSError, "io-error"),
)


class RestoreFailed(Exception):
    """A replica could not be restored; `reason` is one of a few keys, the text says what happened."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Restorer:
    def __init__(
        self,
        criu: Criu | None,
        why_no_criu: str,
        kdat: Path,
        ladder: Ladder,
        huge: HugePages,
        headroom: Headroom,
        cuda: Cuda | None,
        weights: Weights,
    ) -> None:
        """Without `criu`, every restore fails with `why_no_criu`."""
        self._criu = criu
        self._why_no_criu = why_no_criu
        self._kdat = kdat
        self._ladder = ladder
        self._huge = huge
        self._headroom = headroom
        self._cuda = cuda
        self._weights = weights
        self.memory_to_process = Bandwidth()
        self.overhead: dict[str, float] = {}  # digest → seconds of a restore beside its fill, smoothed

    async def restore(self, snapshot: Snapshot, phases: Phases) -> Engine:
        """Raises RestoreFailed; then nothing is left of it."""
        if os.geteuid() != 0:
            raise RestoreFailed("not-root", "restoring needs root; start the agent with sudo")
        if self._criu is None:
            raise RestoreFailed("no-criu", self._why_no_criu)
        if why := self._ladder.unusable.get(snapshot.digest):
            raise RestoreFailed("unusable", f"snapshot {snapshot} failed before on this node: {why}")
        # A minute, and for huge images a second for each 100 MiB: CRIU has been seen to spin for ever on a torn image.
        deadline = 60.0 + snapshot.manifest.image_bytes / (100 << 20)
        try:
            async with asyncio.timeout(deadline):
                return await self._restore(self._criu, snapshot, phases)
        except tuple(kind for kind, _ in _REASONS) as error:
            reason = next(key for kind, key in _REASONS if isinstance(error, kind))
            detail = str(error) or f"the restore took longer than {deadline:.0f} s and was given up"
            raise RestoreFailed(reason, f"snapshot {snapshot}: {detail}") from error

    async def _restore(self, criu: Criu, snapshot: Snapshot, phases: Phases) -> Engine:
        manifest = snapshot.manifest
        self._headroom.give()
        with self._ladder.hold(snapshot) as staged:
            async with contextlib.AsyncExitStack() as undo:
                with phases.phase("image.sandbox"):
                    sandbox = await undo.enter_async_context(await Sandbox.create(self._kdat))
                    output = Output(manifest.model)
                    undo.callback(output.close)
                with phases.phase("staged"):
                    images = await asyncio.shield(staged.skeleton)
                    self._lay_out(staged, sandbox)
                begin = time.monotonic()
                weights = asyncio.create_task(fill_all(self._weights, manifest, staged.directory), name="weights")
                undo.callback(weights.cancel)
                async with self._worker(criu, sandbox, output, manifest.stdio) as worker:
                    pid = await worker.restore(str(images), lambda: self._fill(staged, sandbox, phases))
                held = phases.seconds("staged.pages") + phases.seconds("image.fill")
                phases.add("image.criu", time.monotonic() - begin - held)
                if manifest.gpu_pids:
                    await self._resume(manifest, sandbox, phases)
                if manifest.weights:
                    # They were on their way all the while; what is waited for here is what they took longer.
                    with phases.phase("weights"):
                        await weights
                engine = Engine(manifest.engine, sandbox, output, pid)
                engine.tell(RESTORE_COMPLETE)
                if sandbox.exit_of(pid).done():
                    raise CriuError(str(engine.end_error()))
                undo.pop_all()
        overhead = phases.total - phases.seconds("image.fill") - phases.seconds("staged.pages")
        before = self.overhead.get(snapshot.digest, overhead)
        self.overhead[snapshot.digest] = before + 0.3 * (overhead - before)
        return engine

    @contextlib.asynccontextmanager
    async def _worker(self, criu: Criu, sandbox: Sandbox, output: Output, keys: tuple[str, str]) -> AsyncIterator[Worker]:
        with output.writers() as fds:
            async with Worker.start(criu, sandbox, dict(zip(keys, fds, strict=True))) as worker:
                yield worker

    async def _fill(self, staged: Staged, sandbox: Sandbox, phases: Phases) -> None:
        begin = time.monotonic()
        arena = await asyncio.shield(staged.arriving)
        whole = arena.whole
        with self._huge.on():
            seconds = await arena.fill(sandbox.host_pids())
        phases.add("image.fill", seconds)
        phases.add("staged.pages", time.monotonic() - begin - seconds)  # for which it waited
        if whole:
            self.memory_to_process.measured(arena.size, seconds)

    async def _resume(self, manifest: Manifest, sandbox: Sandbox, phases: Phases) -> None:
        if self._cuda is None:
            raise CudaError("the snapshot holds GPU state and this node has no usable GPU")
        hosts = sandbox.host_pids()
        await self._cuda.resume([hosts[pid] for pid in manifest.gpu_pids], phases, manifest.gpu_bytes)

    def _lay_out(self, staged: Staged, sandbox: Sandbox) -> None:
        archive = staged.directory / TMPFS_ARCHIVE
        if archive.exists():
            with tarfile.open(archive) as tar:
                # Ours, and verified: taken out as it was put in. (The argument `filter` is missing in Debian 12's Python.)
                tar.extraction_filter = staticmethod(lambda member, _: member)
                tar.extractall(sandbox.root)

    async def start_cold(self, record: EngineRecord, model: str, phases: Phases) -> Engine:
        """Starts the engine's own command. Raises EngineError, SandboxError."""
        async with contextlib.AsyncExitStack() as undo:
            with phases.phase("image.sandbox"):
                if os.geteuid() == 0:
                    sandbox: Sandbox | Bare = await Sandbox.create(self._kdat)
                else:
                    sandbox = await Bare.create(record.port)
                await undo.enter_async_context(sandbox)
                output = Output(model)
                undo.callback(output.close)
            with phases.phase("health"):
                engine = await Engine.start(record, sandbox, output, for_snapshot=False)
                await engine.wait_healthy()
            undo.pop_all()
            return engine


def archive_tmpfs(sandbox: Sandbox) -> bytes:
    """What the engine keeps in its /dev/shm and /run, as a tar; empty where there is nothing."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for folder in ("dev/shm", "run"):
            for path in sorted((sandbox.root / folder).iterdir()):
                if path.name not in ("criu.kdat", "thaw"):
                    tar.add(path, f"{folder}/{path.name}", filter=lambda entry: entry if entry.isreg() or entry.isdir() else None)
        empty = not tar.getmembers()
    return b"" if empty else data.getvalue()
