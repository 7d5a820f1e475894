"""An engine in its place: started, asked whether it is healthy, asked a real request, told of snapshots by the control directory.

The control directory is NVIDIA Snapshot's protocol, so that engines made for it work here unchanged: the engine writes
`ready-for-snapshot` when it has quiesced; the agent writes `snapshot-complete` after a dump and `restore-complete` after a restore, each
under a temporary name and then renamed. Engines that know nothing of it are taken when healthy and idle. Ours is one word more, for
engines that know it: `quiesce-requested` asks a running engine to become ready once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import aiohttp

from restore_agent.engine import renewal
from restore_agent.engine.control import Control
from restore_agent.engine.listening import listens_elsewhere
from restore_agent.engine.renewal import Announced
from restore_agent.errors import AgentError
from restore_agent.places.connections import accepted
from restore_agent.places.place import CONTROL_DIRECTORY, Output, Place, describe_exit
from restore_agent.places.processes import cpu_seconds, is_stopped
from restore_agent.snapshots.manifest import EngineRecord
from restore_agent.workload.control_directory import (
    GPUS,
    QUIESCE_REQUESTED,
    READY,
    RESTORE_COMPLETE,
    SNAPSHOT_COMPLETE,
    VARIABLE,
    WAKE_BYTES,
    WEIGHTS,
)
from restore_agent.workload.renewal import Return
from zerowake_shared.backoff import Backoff
from zerowake_shared.json_text import parsed
from zerowake_shared.network_namespace import NetworkNamespace

_LOG = logging.getLogger("zerowake.agent")

_WAKE_BYTES = re.compile(WAKE_BYTES + r"\d+-(?P<gpu>GPU-[0-9a-f-]{36})-(?P<size>\d{1,12})")
_QUIET_PROBE = 0.05
_FIRST_PROBE, _LAST_PROBE = 0.02, 0.2  # seconds between two probes of something that cannot be waited for
_LAST_WORDS = 2.0  # seconds in which an engine that is ready for its snapshot ends what it was asked before
_STILL_WINDOW = 0.5  # seconds in which an engine does nothing at all: it is idle
_IDLE_WINDOW = 2.0  # seconds with next to no work, as of one that polls: it is idle, too
_IDLE_SHARE = 0.02  # of one core
_MISPLACED_SECONDS = 10.0  # idle for so long, and listening elsewhere: it will not listen where it should
_HEARS_SECONDS = 2.0  # in which an engine that was woken has come to wait for the next word
_STOP_SECONDS = 5.0
_RENEWAL_SECONDS, _RENEWAL_ASLEEP_SECONDS, _RENEWAL_PROBE = 2.0, 1.0, 0.0005
_CALLED_LENGTH = 80  # characters of a command in a message
_LARGEST_ANSWER = 16 << 20  # bytes that are read of what an engine says
_T = TypeVar("_T")


class EngineError(AgentError):
    """An engine did not start, ended, or did not answer."""

    reason = "engine-failed"


@dataclass(frozen=True)
class Answer:
    """What an engine said to a request."""

    status: int  # of HTTP
    body: str


class Engine:
    """A running engine: the place it is in, its root process (pid as seen inside) and where it prints."""

    def __init__(
        self, record: EngineRecord, place: Place, output: Output, pid: int, dumped_at: float | None = None, renews: Sequence[Announced] = ()
    ) -> None:
        """`dumped_at`: of one that was made of an image, by the wall clock; `renews`: its processes that make their random state anew."""
        self.record = record
        self.place = place
        self.output = output
        self.pid = pid
        self.gpu_bytes: Mapping[str, int] = {}  # UUID of each GPU that it is on → what its last resume took there
        self.gpu_places: Mapping[str, str] = {}  # UUID of each GPU of its snapshot → of the one in its place; none: each is itself
        self._control = Control(place, pid)
        self._dumped_at = dumped_at  # until it was told that it was restored
        self._stopped_at: float | None = None
        self._renews = renews
        self._entropy: bytes | None = None  # of what was made anew while it slept: its ranks have to agree, also one that does so later

    @classmethod
    async def start(cls, record: EngineRecord, place: Place, output: Output, *, for_snapshot: bool) -> Engine:
        """Raises PlaceError."""
        env = dict(record.env)
        if for_snapshot:
            Control.make_doors(place)
            env[VARIABLE] = str(CONTROL_DIRECTORY)
        with output.writers() as fds:
            pid = await place.spawn(record.command, env, record.directory, fds, engine=True)
        return cls(record, place, output, pid)

    @property
    def called(self) -> str:
        """The beginning of its command: a text that names it must leave room for what happened."""
        command = " ".join(self.record.command)
        return command if len(command) <= _CALLED_LENGTH else f"{command[:_CALLED_LENGTH]}…"

    def end_error(self) -> EngineError:
        """What to say once the root process has ended."""
        exited = self.place.exit_of(self.pid)
        how = describe_exit(exited.result()) if exited.done() else "ended"
        return EngineError(f"the engine {self.called!r} ended: {how}{self.output.tail()}")

    async def wait_healthy(self, or_ready: bool = False) -> None:
        """Until GET on the health path answers 2xx; with `or_ready`, also when it has written `ready-for-snapshot`.

        Raises:
            EngineError: it ended, the record's ready_timeout_seconds are over, or it listens elsewhere and does nothing more.
        """
        ended = self.place.exit_of(self.pid)
        deadline = time.monotonic() + self.record.ready_timeout_seconds
        probes, last = Backoff(_FIRST_PROBE, _LAST_PROBE, factor=1.5), "nothing listens"
        began = since = time.monotonic()
        used = self._cpu_seconds()
        async with self.session() as session:
            while True:
                if ended.done():
                    raise self.end_error()
                if or_ready and self.is_ready:
                    return
                try:
                    answer = await self.ask(session, self.record.health_path, seconds=5.0)
                    if 200 <= answer.status < 300:
                        return
                    last = f"{self.record.health_path} answers {answer.status}"
                except EngineError as error:
                    last = str(error)
                now = time.monotonic()
                # Some listen for their own workers long before they serve: one that works is not given up.
                idle = now - since >= _MISPLACED_SECONDS
                elsewhere = self._elsewhere() if idle or now > deadline else ""
                if now > deadline or elsewhere:
                    raise EngineError(
                        f"the engine {self.called!r} was not healthy within {now - began:.0f} s: {elsewhere or last}{self.output.tail()}"
                    )
                if idle or self._cpu_seconds() - used > _IDLE_SHARE * _MISPLACED_SECONDS:
                    since, used = now, self._cpu_seconds()
                await asyncio.wait([ended], timeout=probes.next())

    async def is_healthy(self) -> bool:
        """Whether it is, asked once."""
        async with self.session() as session:
            try:
                return 200 <= (await self.ask(session, self.record.health_path, seconds=5.0)).status < 300
            except EngineError:
                return False

    def clients(self) -> int:
        """Connections to it on which it may be answering."""
        host = self.place.host_pid(self.pid)
        return accepted(host, self.record.port) if host is not None else 0

    async def wait_quiet(self) -> bool:
        """Until it may be dumped. Returns whether it said so itself (`ready-for-snapshot`); else it was idle for a while.

        Raises:
            EngineError: it ended, or went on working past the record's ready_timeout_seconds.
        """
        ended = self.place.exit_of(self.pid)
        deadline = time.monotonic() + self.record.ready_timeout_seconds
        since, used = still, last = time.monotonic(), self._cpu_seconds()
        while time.monotonic() < deadline:
            if ended.done():
                raise self.end_error()
            if self.is_ready:
                return True
            now, now_used = time.monotonic(), self._cpu_seconds()
            if now_used - used > _IDLE_SHARE * _IDLE_WINDOW:
                since, used = now, now_used
            if now_used != last:
                still, last = now, now_used
            if now - still >= _STILL_WINDOW or now - since >= _IDLE_WINDOW:
                return False
            await asyncio.wait([ended], timeout=_QUIET_PROBE)
        raise EngineError(
            f"the engine {self.called!r} neither wrote {READY} nor became idle within {self.record.ready_timeout_seconds:.0f} s"
        )

    async def quiesce(self) -> None:
        """Asks a running engine to let go of what is lent to it; returns when it has. The caller sets the deadline.

        One that was woken a moment ago may not have heard of it yet: the word that wakes it is taken back when it waits for the next one.

        Raises:
            EngineError: it ended.
        """
        ended = self.place.exit_of(self.pid)
        with contextlib.suppress(TimeoutError):  # it does not wait at doors
            async with asyncio.timeout(_HEARS_SECONDS):
                while not ended.done() and not self._control.is_awaited(QUIESCE_REQUESTED):
                    await asyncio.wait([ended], timeout=_FIRST_PROBE)
        self._control.take_back(READY, SNAPSHOT_COMPLETE, RESTORE_COMPLETE)
        self.tell(QUIESCE_REQUESTED)
        while not self.is_ready:
            if ended.done():
                raise self.end_error()
            await asyncio.wait([ended], timeout=_FIRST_PROBE)
        self._control.take_back(QUIESCE_REQUESTED)

    def named_weights(self) -> dict[Path, str]:
        """Checkpoint directories whose regions it attached by itself (`weights.json`, ours), as it sees them: `Place.checkpoint` knows
        where they are; each with the UUID of the GPU that it is lent on, where it says so. Raises EngineError: it is no list of them.
        """
        path = self.place.control_directory / WEIGHTS
        if not path.exists():
            return {}
        try:
            said = parsed(path.read_text())
            gpus = dict(said.get("gpus", {}))
            return {Path(directory): str(gpus.get(directory, "")) for directory in said["directories"]}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EngineError(f"the engine {self.called!r} wrote a {WEIGHTS} that is none: {error!r}") from None

    def wake_bytes(self) -> dict[str, int]:
        """UUID of each GPU → bytes of it that the engine let go of as it quiesced last, and takes again as it wakes."""
        found: dict[str, int] = {}
        for path in self.place.control_directory.glob(f"{WAKE_BYTES}*"):
            if said := _WAKE_BYTES.fullmatch(path.name):
                found[said["gpu"]] = found.get(said["gpu"], 0) + int(said["size"])
        return found

    def stop(self) -> None:
        """Stops every process of it. Blocks until all stand still."""
        self._stopped_at = time.time()
        deadline = time.monotonic() + _STOP_SECONDS
        while running := [host for host in self._hosts() if not is_stopped(host)]:
            if time.monotonic() > deadline:
                raise EngineError(f"the engine {self.called!r} does not stop: pid {running[0]} goes on")
            for host in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(host, signal.SIGSTOP)

    def go_on(self) -> None:
        """Undoes `stop`."""
        for host in self._hosts():
            with contextlib.suppress(ProcessLookupError):
                os.kill(host, signal.SIGCONT)

    def woken(self, moved: Mapping[str, str]) -> None:
        """Tells a restored engine to go on. `moved`: UUID of a GPU that it ran on → of the other one that has taken its place."""
        if moved:
            self._control.write(GPUS, json.dumps(moved))
        since = self._dumped_at or self._control.said_at(READY) or self._stopped_at
        back = Return.fresh(None if since is None else max(time.time() - since, 0.0), restored=self._dumped_at is not None)
        if self._entropy:
            back, self._entropy = replace(back, entropy=self._entropy), None
        self._control.say(RESTORE_COMPLETE, back.encode())
        if self._dumped_at is not None:
            renewal.send(self._renews, self.place.host_pid)
        self._dumped_at = self._stopped_at = None

    async def renew_asleep(self) -> None:
        """Has the processes of a restored engine that sleeps make anew what all replicas have in common, those that hear of it by the
        control directory, so that its wake need not."""
        hearing = [each for each in self._renews if not each[2]]  # who wants a signal gets it at the wake
        if self._dumped_at is None or self._entropy or not hearing:
            return
        back = Return.fresh(max(time.time() - self._dumped_at, 0.0), restored=True)
        self._entropy = back.entropy
        with contextlib.suppress(OSError), self._control.renewing(back.encode()):
            await self._renewed(hearing, _RENEWAL_ASLEEP_SECONDS)

    async def renewed(self) -> None:
        """After `woken`, until its processes have made anew what all replicas have in common: before that it may serve nobody."""
        awaited = await self._renewed(self._renews, _RENEWAL_SECONDS)
        if awaited and (pids := sorted({pid for pid, _, _ in awaited} & self.place.host_pids().keys())):
            _LOG.warning(
                "pid %s of the engine %r did not make its random state anew within %.0f s, and serves all the same",
                *(", ".join(map(str, pids)), self.called, _RENEWAL_SECONDS),
            )
        self._renews = ()

    async def _renewed(self, them: Collection[Announced], seconds: float) -> list[Announced]:
        """Waits until these have said it again, so long at most. Returns those that have not; none, where the engine has ended."""
        ended = self.place.exit_of(self.pid)
        deadline = time.monotonic() + seconds
        while (awaited := renewal.awaited(them, self.place.control_directory)) and not ended.done():
            if time.monotonic() > deadline:
                return awaited
            await asyncio.wait([ended], timeout=_RENEWAL_PROBE)
        return []

    async def unless_ready(self, work: Awaitable[_T]) -> _T | None:
        """The work's result, or None where the engine became ready for its snapshot and did not end the work soon: it is asleep by then."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done() and not self.is_ready:
                await asyncio.wait([task], timeout=_LAST_PROBE)
            await asyncio.wait([task], timeout=_LAST_WORDS)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            await asyncio.wait([task])

    @property
    def is_ready(self) -> bool:
        return self._control.is_ready

    def tell(self, word: str) -> None:
        """Says one of the agent's words in the control directory."""
        self._control.say(word)

    def taken_over(self) -> None:
        """By this agent, from one that ended: what that one has said is heard by an engine that had not got there yet."""
        self._control.reopen()

    def session(self) -> aiohttp.ClientSession:
        """HTTP into the place's network. A connection never outlives its request, so that none is in an image."""
        return aiohttp.ClientSession(
            base_url=f"http://127.0.0.1:{self.record.port}",
            connector=aiohttp.TCPConnector(socket_factory=self._socket, happy_eyeballs_delay=None, force_close=True),
        )

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to it. Raises OSError."""
        ours = self._socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", None))
        try:
            ours.setblocking(False)
            await asyncio.get_running_loop().sock_connect(ours, ("127.0.0.1", self.record.port))
            return await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise

    async def ask(self, session: aiohttp.ClientSession, path: str, body: str = "", *, seconds: float = 60.0) -> Answer:
        """POST of JSON, or GET without a body. Raises EngineError: no answer."""
        try:
            async with session.request(
                "POST" if body else "GET",
                path,
                data=body.encode() if body else None,
                headers={"Content-Type": "application/json"} if body else {},
                timeout=aiohttp.ClientTimeout(total=seconds),
            ) as response:
                return Answer(response.status, await _text(response))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EngineError(f"{path} on port {self.record.port}: {str(error) or type(error).__name__}") from None

    def _socket(self, address: tuple[int, int, int, str, object]) -> socket.socket:
        family, kind, protocol = address[:3]
        if not self.place.netns:
            return socket.socket(family, kind, protocol)
        with NetworkNamespace(self.place.netns) as network:
            return network.socket(family, kind, protocol)

    def _hosts(self) -> list[int]:
        return [host for pid, host in self.place.host_pids().items() if pid != 1]

    def _elsewhere(self) -> str:
        """Where it listens instead, in words, or nothing. A network that is not its own is full of others'."""
        host = self.place.host_pid(self.pid) if self.place.netns else None
        if host is None or not (found := listens_elsewhere(host, self.record.port)):
            return ""
        return f"{found}; give zerowake the engine's port, or the engine an address that takes in 127.0.0.1"

    def _cpu_seconds(self) -> float:
        return cpu_seconds(self.place.host_pids().values())


async def _text(response: aiohttp.ClientResponse) -> str:
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > _LARGEST_ANSWER:
            raise aiohttp.ClientPayloadError(f"it answers with more than {_LARGEST_ANSWER >> 20} MiB")
    try:
        return data.decode(response.charset or "utf-8", errors="replace")
    except LookupError:  # of a charset that nobody knows
        return data.decode(errors="replace")
