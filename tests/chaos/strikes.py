"""How each fault is done, and undone: from outside, by what the kernel gives everybody.

`strike` waits for the fault's moment, does it, and undoes it after its seconds; it returns whether there was anything to do it to. What a
file lost it gets back at the next quiet moment (`mend`), as from a backup: until then the product has to live with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos import misuse
from tests.chaos.disk import throttle
from tests.chaos.faults import Fault
from tests.chaos.journal import append
from tests.chaos.moments import AT_ONCE
from tests.chaos.proxy import Proxy
from tests.chaos.stack import PORT, Machine, Stack, signalled
from tests.chaos.wires import EngineWire
from tests.worlds.processes import below
from zerowake_shared.phases import Phase

_MOMENT_SECONDS = 5.0  # that the moment of a fault is waited for
_NAMED = {"engine": "chaos/engine.py", "sandbox": "sandbox-init", "criu": "criu"}
_DESCRIPTORS_LEFT = 2


class Strikes:
    """The hand that does them. journal: of the faults."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._damaged: dict[Path, bytes] = {}
        self._loose: set[asyncio.Task[None]] = set()

    async def strike(self, fault: Fault) -> bool:
        """Does it, and undoes what does not stay. False: there was nothing to do it to."""
        machine = self._stack.machines[fault.machine]
        chance = random.Random(fault.chance)
        word = fault.kind.replace(" ", "_").replace("-", "_")
        return bool(await getattr(self, f"_{word}")(fault, machine, chance))

    def mend(self) -> None:
        """Files that were damaged get their bytes back where they are still there, or a manifest names them; all else is healed, too."""
        for path, content in self._damaged.items():
            if path.exists() or _named(path):
                path.write_bytes(content)
        self._damaged.clear()
        self._stack.proxy.heal()
        self._stack.clock.jump(0)
        (self._stack.pids / "pids.max").write_text("max")
        for machine in self._stack.machines.values():
            (machine.state / "ballast").unlink(missing_ok=True)
            machine.wire.heal()

    async def close(self) -> None:
        for task in self._loose:
            task.cancel()
        await asyncio.gather(*self._loose, return_exceptions=True)

    # Processes

    def pids(self, victim: str, machine: Machine) -> list[int]:
        """Of a victim, as they are now."""
        stack = self._stack
        if victim == "scaler":
            found = [machine.service.pid]
        elif victim == "agent":
            found = [machine.agent_pid()]
        elif victim in ("gpumem", "s3"):
            found = [stack.services[victim].pid]
        elif victim == "filler":
            pid = stack.services["gpumem"].pid
            found = [child for _, child, _ in below(pid)] if pid else []
        else:
            agent = machine.agent_pid()
            found = [pid for _, pid, words in below(agent) if _is(victim, words)] if agent else []
        return [pid for pid in found if pid]

    async def _moment(self, fault: Fault, machine: Machine) -> bool:
        """Waits for it. False: it did not come."""
        if fault.moment == AT_ONCE:
            return True
        came = self._came(fault.moment, machine)
        deadline = time.monotonic() + _MOMENT_SECONDS
        while not came():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.003)
        return True

    def _came(self, moment: str, machine: Machine) -> Callable[[], bool]:
        """Most phases are told as they begin (planted/sitecustomize.py), and the others, which are only added up, are seen from outside."""
        told = _size(machine.phases)
        engines, length = set(self.pids("engine", machine)), _size(self._stack.engines / "journal.jsonl")
        arriving = machine.state / "arriving"
        before = set(arriving.glob("*"))

        def phase() -> bool:
            with machine.phases.open() as lines:
                lines.seek(told)
                return moment in lines.read().split("\n")

        def engine() -> bool:
            return bool(set(self.pids("engine", machine)) - engines)

        seen: dict[str, Callable[[], bool]] = {
            Phase.FETCH: lambda: not before.issuperset(arriving.glob("*")),
            Phase.IMAGE_CRIU: lambda: bool(self.pids("criu", machine)),
            Phase.IMAGE_FILL: engine,
            Phase.STAGED_PAGES: engine,
            Phase.FIRST_BYTE: lambda: _size(self._stack.engines / "journal.jsonl") > length,
        }
        return seen.get(moment, phase)

    async def _victims(self, fault: Fault, machine: Machine, chance: random.Random) -> list[int]:
        if not await self._moment(fault, machine):
            return []
        deadline = time.monotonic() + 3.0
        while not (found := self.pids(fault.victim, machine)) and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        for service in self._stack.services.values():
            if (fault.victim in ("scaler", "agent") and service is machine.service) or service.name == fault.victim:
                service.hit = True
        return [chance.choice(found)] if found and fault.victim not in ("criu",) else found

    async def _kill(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return any([signalled(pid, signal.SIGKILL) for pid in await self._victims(fault, machine, chance)])

    async def _stop(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        pids = [pid for pid in await self._victims(fault, machine, chance) if signalled(pid, signal.SIGSTOP)]
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            for pid in pids:
                signalled(pid, signal.SIGCONT)
        return bool(pids)

    # What a machine can lack

    async def _disk_full(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        ballast = machine.state / "ballast"
        try:
            left = chance.choice((0, 0, 4096, 300_000))
            with contextlib.suppress(OSError), ballast.open("wb") as file:
                room = os.statvfs(machine.state)
                os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail * room.f_frsize - left))
            await asyncio.sleep(fault.seconds)
        finally:
            ballast.unlink(missing_ok=True)
        return True

    async def _disk_slow(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        rate = chance.choice((100_000, 1_000_000))
        for path in machine.state.glob("chunks/*/*"):  # which else would come out of the page cache
            with contextlib.suppress(OSError), path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            throttle(machine.state, rate)
            await asyncio.sleep(4 * fault.seconds)
        finally:
            throttle(machine.state, 0)
        return True

    async def _descriptors(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        def few(pid: int) -> tuple[int, int]:
            return len(list(Path(f"/proc/{pid}/fd").iterdir())) + _DESCRIPTORS_LEFT, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]

        return await self._limited(fault, machine, chance, resource.RLIMIT_NOFILE, few)

    async def _limited(
        self, fault: Fault, machine: Machine, chance: random.Random, what: int, few: Callable[[int], tuple[int, int]]
    ) -> bool:
        done = False
        for pid in await self._victims(fault, machine, chance):
            with contextlib.suppress(OSError):
                before = resource.prlimit(pid, what)
                resource.prlimit(pid, what, few(pid))
                done = True
                try:
                    await asyncio.sleep(fault.seconds)
                finally:
                    with contextlib.suppress(OSError):
                        resource.prlimit(pid, what, before)
        return done

    async def _memory(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        def few(pid: int) -> tuple[int, int]:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
            return pages * os.sysconf("SC_PAGESIZE") + (1 << 20), resource.prlimit(pid, resource.RLIMIT_AS)[1]

        return await self._limited(fault, machine, chance, resource.RLIMIT_AS, few)

    async def _memory_short(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        """The machine's programs together: the kernel takes their page cache, and then ends one that wants more, whichever it is."""
        group = machine.service.memory
        machine.service.hit = True
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.usage_in_bytes").read_text())
        kept = used - int(held["total_inactive_file"]) - int(held["total_active_file"])
        limit = group / "memory.limit_in_bytes"
        try:
            limit.write_text(str(kept + chance.choice((1, 4, 16)) * (1 << 20)))
        except OSError:  # it cannot be taken from them now
            return False
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            limit.write_text("-1")
        return True

    async def _pids(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        group = self._stack.pids
        (group / "pids.max").write_text(str(int((group / "pids.current").read_text()) + chance.randrange(3)))
        for service in self._stack.services.values():
            service.hit = True
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            (group / "pids.max").write_text("max")
        return True

    async def _clock(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        self._stack.clock.jump(chance.choice((-86_400, -3_600, -5, 5, 3_600, 86_400)))
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            self._stack.clock.jump(0)
        return True

    # Files

    async def _chunk_flipped(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return self._spoil(_pick(machine.state / "chunks", "*/*", chance), lambda content: _flipped(content, chance))

    async def _chunk_torn(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return self._spoil(_pick(machine.state / "chunks", "*/*", chance), lambda content: content[: chance.randrange(len(content))])

    async def _chunk_removed(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return self._spoil(_pick(machine.state / "chunks", "*/*", chance), lambda content: None)

    async def _manifest_flipped(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return self._spoil(_pick(machine.state / "snapshots", "*/*.json", chance), lambda content: _flipped(content, chance))

    async def _manifest_torn(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return self._spoil(
            _pick(machine.state / "snapshots", "*/*.json", chance), lambda content: content[: chance.randrange(len(content))]
        )

    def _spoil(self, path: Path | None, how: Callable[[bytes], bytes | None]) -> bool:
        if path is None:
            return False
        try:
            content = path.read_bytes()
            spoiled = how(content)
            self._damaged.setdefault(path, content)
            if spoiled is None:
                path.unlink()
            else:
                path.write_bytes(spoiled)
        except (OSError, ValueError):
            return False
        return True

    # Connections

    async def _wire_cut(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return await self._spoiled(fault, machine, chance, EngineWire.cut, Proxy.cut)

    async def _wire_slow(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return await self._spoiled(fault, machine, chance, EngineWire.slow, Proxy.slow)

    async def _wire_silent(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return await self._spoiled(fault, machine, chance, EngineWire.silence, Proxy.silence)

    async def _wire_refuses(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return await self._spoiled(fault, machine, chance, EngineWire.refuse, Proxy.refuse)

    async def _wire_half_open(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return await self._spoiled(fault, machine, chance, EngineWire.half_open, Proxy.silence)

    async def _spoiled(
        self,
        fault: Fault,
        machine: Machine,
        chance: random.Random,
        of_engine: Callable[[EngineWire], bool],
        of_proxy: Callable[[Proxy], bool],
    ) -> bool:
        """One of both is done to the connection, and undone after the fault's seconds. False: there was none."""
        if fault.victim != "engine":
            proxy = machine.wire if fault.victim == "agent" else self._stack.proxy
            done = of_proxy(proxy)
            await asyncio.sleep(fault.seconds)
            proxy.heal()
            return done
        engines = self.pids("engine", machine)
        try:
            wire = EngineWire(f"/proc/{chance.choice(engines) if engines else 0}/ns/net", PORT)
        except OSError:
            return False
        try:
            done = of_engine(wire)
            await asyncio.sleep(fault.seconds)
        finally:
            wire.heal()
            wire.close()
        return done

    async def _keda_storm(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return await misuse.storm(machine.ports["keda"], chance)

    async def _keda_half_open(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return await misuse.half_open(machine.ports["keda"], chance, fault.seconds)

    async def _keda_garbage(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return await misuse.garbage(machine.ports["keda"], chance)

    async def _gateway_garbage(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return await misuse.garbage(machine.ports["gateway"], chance)

    async def _slow_heads(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return await misuse.slow_heads(machine.ports["gateway"], fault.seconds)

    async def _clients_leave(self, fault: Fault, machine: Machine, chance: random.Random) -> bool:
        return await misuse.leave(machine.ports["gateway"], self._stack.folder / "requests.jsonl", chance)


def written(path: Path, fault: Fault, what: str, **more: object) -> None:
    """A line of the faults' journal."""
    append(path, what=what, **fault.written(), **more)


def _is(victim: str, words: str) -> bool:
    return _NAMED[victim] in (words if victim == "engine" else words.split(" ", maxsplit=1)[0])


def _named(chunk: Path) -> bool:
    """Whether a snapshot of that machine needs it: else nobody would miss it, and it would be left over."""
    return any(chunk.name.encode() in manifest.read_bytes() for manifest in chunk.parents[2].glob("snapshots/*/manifest.json"))


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _pick(folder: Path, pattern: str, chance: random.Random) -> Path | None:
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    return chance.choice(found) if found else None


def _flipped(content: bytes, chance: random.Random) -> bytes:
    spoiled = bytearray(content)
    spoiled[chance.randrange(len(spoiled))] ^= 1 << chance.randrange(8)
    return bytes(spoiled)
