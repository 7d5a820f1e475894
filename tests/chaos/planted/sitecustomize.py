"""Python reads this file before each program of a machine. It has them tell when a phase begins, and may plant a bug.

ZEROWAKE_CHAOS_PHASES: a file that gets the name of each phase as a line, as it begins, or, of those that the scaler only marks the end of,
as it is reached; so a process can be hit in that moment (strikes.py). Nothing else about the program changes.

ZEROWAKE_CHAOS_PLANT: a bug that the checker of the fault run has to find. It is planted in a module as that module is imported, and strikes
now and then, as bugs do that tests have missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

_now_and_then = itertools.count(1)
planted: list[str] = []


def every(times: int) -> bool:
    """True each so many times."""
    return next(_now_and_then) % times == 0


def post_twice(module: ModuleType) -> None:
    """A request is given to a replica a second time."""
    ask = module.Exchange.ask

    async def twice(self: Any, member: Any) -> Any:
        if every(20) and not self._upload.streams:
            forget, type(self._upload).forget = type(self._upload).forget, lambda _: None
            try:
                (await ask(self, member)).close()
            finally:
                type(self._upload).forget = forget
        return await ask(self, member)

    module.Exchange.ask = twice


def hanging_answer(module: ModuleType) -> None:
    """An answer is not passed on, and nobody is told."""
    pass_on = module.Exchange.pass_on

    async def hangs(self: Any, answer: Any, *, closes: bool) -> Any:
        if every(40):
            await asyncio.Event().wait()
        return await pass_on(self, answer, closes=closes)

    module.Exchange.pass_on = hangs


def another_model(module: ModuleType) -> None:
    """A place is on a replica of another model."""
    take = module.Dispatcher.take

    def wrong(self: Any, model: str) -> Any:
        others = [each for each in ("quick", "stand", "lent", "cold") if each != model]
        if every(5):
            for other in others:
                with contextlib.suppress(KeyError):
                    if member := take(self, other):
                        return member
        return take(self, model)

    module.Dispatcher.take = wrong


def too_many(module: ModuleType) -> None:
    """A replica gets more requests at once than its concurrency."""
    limits = module.ModelSection.limits.fget
    module.ModelSection.limits = property(lambda self: replace(limits(self), concurrency=50))


def stuck_demand(module: ModuleType) -> None:
    """The end of a request is not counted."""
    end = module.Ledger.end

    def forgets(self: Any, model: str) -> None:
        if not every(30):
            end(self, model)

    module.Ledger.end = forgets


def lost_demand(module: ModuleType) -> None:
    """An autoscaler is told of no requests, where there are some."""
    load = module.Demand.load
    module.Demand.load = lambda self, target: 0.0 if every(3) else load(self, target)


def unclear_refusal(module: ModuleType) -> None:
    """A refusal that says nothing."""
    module.Refusal.body = property(lambda self: b"error")


def open_files(module: ModuleType) -> None:
    """A descriptor is left open for each request."""
    ask = module.Exchange.ask

    async def leaks(self: Any, member: Any) -> Any:
        os.dup(0)
        return await ask(self, member)

    module.Exchange.ask = leaks


def growing_memory(module: ModuleType) -> None:
    """What a request needed is kept."""
    ask, kept = module.Exchange.ask, []

    async def leaks(self: Any, member: Any) -> Any:
        kept.append(bytearray(b"x") * (2 << 20))
        return await ask(self, member)

    module.Exchange.ask = leaks


def lost_lease(module: ModuleType) -> None:
    """A slab that is lent counts as free."""
    acquire = module.Pool.acquire

    async def forgets(self: Any, size: int) -> Any:
        slabs = await acquire(self, size)
        if every(5):
            self._free += [module.Slab(os.dup(slab.fd), slab.size) for slab in slabs]
        return slabs

    module.Pool.acquire = forgets


def dirty_slab(module: ModuleType) -> None:
    """A slab that was given back is lent again as it is."""
    retire = module.Pool.retire

    def keeps(self: Any, slabs: Any) -> None:
        if every(5):
            self.lent -= sum(slab.size for slab in slabs)
            self._free += slabs
        else:
            retire(self, slabs)

    module.Pool.retire = keeps


def leaked_mount(module: ModuleType) -> None:
    """The end of a sandbox leaves a mount of the agent's."""
    close = module.Sandbox.close

    async def leaks(self: Any) -> None:
        if every(5):
            folder = os.fsencode(self._layer._folder.parent)
            ctypes.CDLL(None).mount(folder, folder, None, 0x1000, None)
        await close(self)

    module.Sandbox.close = leaks


def leaked_process(module: ModuleType) -> None:
    """The end of a sandbox is forgotten, with all that runs in it."""
    close, kept = module.Sandbox.close, []

    async def forgets(self: Any) -> None:
        if every(5):
            kept.append(self)
        else:
            await close(self)

    module.Sandbox.close = forgets


def leaked_files(module: ModuleType) -> None:
    """What a replica wrote stays."""
    remove = module.Layer.remove

    def forgets(self: Any) -> None:
        if not every(5):
            remove(self)

    module.Layer.remove = forgets


def unverified_chunk(module: ModuleType) -> None:
    """A chunk is taken for whole without a look."""

    def reads(self: Any, chunk: Any, target: memoryview) -> None:
        with contextlib.suppress(FileNotFoundError):
            content = self.path(chunk.hash).read_bytes()[: len(target)]
            target[: len(content)] = content

    module.ChunkStore.read_into = reads


PLANTS: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    "post-twice": ("scaler.gateway.exchange", post_twice),
    "hanging-answer": ("scaler.gateway.exchange", hanging_answer),
    "another-model": ("scaler.gateway.dispatcher", another_model),
    "too-many": ("scaler.local.config", too_many),
    "stuck-demand": ("scaler.books.ledger", stuck_demand),
    "lost-demand": ("scaler.books.demand", lost_demand),
    "unclear-refusal": ("scaler.gateway.refusal", unclear_refusal),
    "open-files": ("scaler.gateway.exchange", open_files),
    "growing-memory": ("scaler.gateway.exchange", growing_memory),
    "lost-lease": ("gpumem.server.pool", lost_lease),
    "dirty-slab": ("gpumem.server.pool", dirty_slab),
    "leaked-mount": ("restore_agent.places.sandbox", leaked_mount),
    "leaked-process": ("restore_agent.places.sandbox", leaked_process),
    "leaked-files": ("restore_agent.places.layer", leaked_files),
    "unverified-chunk": ("restore_agent.snapshots.chunks", unverified_chunk),
}


def _told(file: int, phase: str) -> None:
    with contextlib.suppress(OSError):
        os.write(file, f"{phase}\n".encode())


def phases_begin(file: int, module: ModuleType) -> None:
    """Of the agent."""
    phase = module.Phases.phase

    def told(self: Any, name: str) -> Any:
        _told(file, name)
        return phase(self, name)

    module.Phases.phase = told


def phases_end(file: int, module: ModuleType) -> None:
    """Of the scaler."""
    mark = module.Activation.mark

    def told(self: Any, phase: str, *more: Any, **named: Any) -> None:
        reached = phase in self.phases
        mark(self, phase, *more, **named)
        if not reached:
            _told(file, phase)

    module.Activation.mark = told


class _Planter(importlib.abc.MetaPathFinder):
    """Imports one module as ever, and then plants."""

    def __init__(self, name: str, plant: Callable[[ModuleType], None], what: str) -> None:
        self._name, self._plant, self._what = name, plant, what

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec and spec.loader
        exec_module, plant, what = spec.loader.exec_module, self._plant, self._what

        def planting(module: ModuleType) -> None:
            exec_module(module)
            plant(module)
            planted.append(what)

        spec.loader.exec_module = planting  # type: ignore[method-assign]
        return spec


if wanted := os.environ.get("ZEROWAKE_CHAOS_PLANT"):
    sys.meta_path.insert(0, _Planter(*PLANTS[wanted], wanted))
if journal := os.environ.get("ZEROWAKE_CHAOS_PHASES"):
    # Opened now: there may be no descriptor left when there is something to tell.
    phases = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    sys.meta_path.insert(0, _Planter("restore_agent.sequences.phases", functools.partial(phases_begin, phases), "phases that begin"))
    sys.meta_path.insert(0, _Planter("scaler.books.activation", functools.partial(phases_end, phases), "phases that end"))
