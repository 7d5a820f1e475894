"""The foreman of one device: starts the filler, gives it orders, and starts another when it dies.

The filler is where a device can hurt: it has the CUDA context, and reads files that may hang. So it may die at any moment, by a fault or
by a deadline of ours, and nothing else ends with it: memory belongs to the server, and what the dead one was moving counts as not moved.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import subprocess
import sys
from collections.abc import Sequence

from google.protobuf.message import DecodeError
from zerowake_proto import gpumem_pb2 as pb

from gpumem.filler.arena import Arena
from gpumem.wire.errors import FillerLost, GpumemError, from_message
from gpumem.wire.frames import Channel, ProtocolViolation

START_SECONDS = 300.0  # to make a context and pin the arena
_ENDED = "the filler ended: it is being started again, ask once more"
ORDER_SECONDS = 120.0  # for any one order; the largest moves half a gigabyte from files, or 4 GiB between GPUs
_RESTART_SECONDS = (0.0, 0.1, 0.5, 2.0, 5.0)  # before each further start while none becomes ready

logger = logging.getLogger(__name__)


class FillerProcess:
    """One filler as the server sees it, for as long as it lives: a child process that takes orders over a socket."""

    def __init__(self, process: asyncio.subprocess.Process, channel: Channel) -> None:
        self._process = process
        self._channel = channel
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[pb.Report]] = {}
        self._dead = ""
        self._gone = asyncio.Event()
        self.pid = process.pid

    async def order(self, order: pb.Order, descriptors: Sequence[int] = (), seconds: float = ORDER_SECONDS) -> None:
        """Gives an order and waits until it is done.

        Raises:
            FillerLost: it died, or did not answer in time and was killed.
            GpumemError: what it reports.
        """
        if self._dead:
            raise FillerLost(self._dead)
        order.id = next(self._numbers)
        report = asyncio.get_running_loop().create_future()
        self._waiting[order.id] = report
        try:
            async with asyncio.timeout(seconds):
                await self._channel.send(order.SerializeToString(), descriptors)
                answer: pb.Report = await report
        except TimeoutError:
            await self.gone()
            raise FillerLost(f"the filler did not finish an order within {seconds:.0f} s and was ended: see whether a disk hangs") from None
        except OSError as error:
            raise FillerLost(f"{_ENDED} ({error})") from error
        finally:
            self._waiting.pop(order.id, None)
        if answer.HasField("error"):
            raise from_message(answer.error)

    @property
    def dead(self) -> bool:
        return bool(self._dead)

    async def listen(self) -> None:
        """Takes its reports until it is gone."""
        try:
            while True:
                frame = await self._channel.receive()
                frame.close()
                report = pb.Report.FromString(frame.payload)
                waiting = self._waiting.get(report.id)
                if waiting is not None and not waiting.done():
                    waiting.set_result(report)
        except (EOFError, OSError, ProtocolViolation, DecodeError):
            pass
        finally:
            self._dead = _ENDED
            self._gone.set()
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(FillerLost(self._dead))
                    waiting.exception()  # whoever gave the order may be gone

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    async def gone(self) -> None:
        """Kills it and waits until it can write nothing any more. That may be never, where it hangs in the kernel."""
        self.kill()
        await self._gone.wait()

    async def end(self) -> int:
        """Ends it. Returns its exit status."""
        self.kill()
        self._channel.close()
        return await self._process.wait()


class Foreman:
    """Keeps one filler process running for a device, and hands it to whoever has orders."""

    def __init__(self, identity: str, arena: Arena) -> None:
        self.identity = identity
        self.restarts = 0
        self._arena = arena
        self._filler: FillerProcess | None = None
        self._changed = asyncio.Event()
        self._refusal = ""  # why the last one did not start

    @property
    def pid(self) -> int:
        return self._filler.pid if self._filler is not None else 0

    async def filler(self, seconds: float = START_SECONDS) -> FillerProcess:
        """The filler, when one is there and ready. Raises FillerLost."""
        try:
            async with asyncio.timeout(seconds):
                while self._filler is None or self._filler.dead:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise FillerLost(f"no filler for {self.identity} within {seconds:.0f} s: {self._refusal or 'it is still starting'}") from None
        return self._filler

    async def run(self) -> None:
        """Keeps one filler running, until cancelled."""
        failures = 0
        while True:
            await asyncio.sleep(_RESTART_SECONDS[min(failures, len(_RESTART_SECONDS) - 1)])
            failures += 1
            try:
                await self._one()
                failures = 0
            except (OSError, RuntimeError, GpumemError) as error:  # also where asyncio has no thread to wait for it with
                self._refusal = str(error)
                logger.error("filler of %s did not start: %s", self.identity, error)
            self.restarts += 1

    async def _one(self) -> None:
        """One filler, from start to end. Raises GpumemError, OSError: it never became ready."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        channel = Channel(ours)
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "gpumem.filler.filler", self.identity, str(theirs.fileno())),
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                )
        except BaseException:
            channel.close()
            raise
        filler = FillerProcess(process, channel)
        listening = asyncio.create_task(filler.listen())
        try:
            fds = [self._arena.fd] if self._arena.size else []
            await filler.order(pb.Order(arena=pb.Arena(size=self._arena.size)), fds, START_SECONDS)
            self._set(filler)
            await listening
        finally:
            self._set(None)
            status = await asyncio.shield(asyncio.create_task(filler.end()))
            listening.cancel()  # where the channel was closed before its end was read, nothing more will come
            await asyncio.wait([listening])
            logger.warning("filler of %s (pid %d) ended with status %d", self.identity, filler.pid, status)

    def _set(self, filler: FillerProcess | None) -> None:
        self._filler = filler
        self._changed.set()
