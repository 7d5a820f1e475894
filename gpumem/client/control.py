"""The client of an asyncio program that stages and looks: it fills, evicts, pins, and does what only the operator may. It maps nothing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from zerowake_proto import gpumem_pb2 as pb

from gpumem.wire.blocking_connection import ANSWER_SECONDS
from gpumem.wire.errors import PeerGone, from_message
from gpumem.wire.frames import VERSION, Channel, ProtocolViolation
from gpumem.wire.sources import Source, close_files, fill_request


class Control:
    """An asyncio client for whoever manages memory and does not map it.

    Any number of calls at once; each raises PeerGone, and what the server says. A call that is cancelled goes on at the server, but for
    `fill`, which is stopped there too (what it brought stays).
    """

    def __init__(self, channel: Channel, path: Path) -> None:
        self._channel = channel
        self._path = path
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[pb.Reply]] = {}
        self._gone = ""
        self.welcome = pb.Welcome()

    @staticmethod
    @contextlib.asynccontextmanager
    async def connected(path: Path, label: str = "control") -> AsyncIterator[Control]:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        channel = Channel(connection)
        listening = None
        try:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await asyncio.get_running_loop().sock_connect(connection, str(path))
            except OSError as error:
                raise PeerGone(f"no gpumem answers at {path} ({error}): start one with `gpumem serve --socket {path}`") from error
            control = Control(channel, path)
            listening = asyncio.create_task(control._listen())
            control.welcome = (await control._ask(pb.Request(hello=pb.Hello(version=VERSION, label=label)))).welcome
            yield control
        finally:
            if listening is not None:
                listening.cancel()
                await asyncio.wait([listening])
            channel.close()

    async def fill(
        self, layout: pb.Layout | bytes, sources: Sequence[Source], device: str, pinned: bool = False, *, spare: bool = False
    ) -> pb.Filled:
        """As Client.fill, on any device; device "": into the arena only. spare: only into room that nobody has, else OutOfMemory."""
        opening = asyncio.ensure_future(asyncio.to_thread(fill_request, layout, sources, device, pinned, spare=spare))
        try:
            request, files = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)
            raise
        try:
            return (await self._ask(request, files, seconds=None)).filled
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                await self._channel.send(pb.Request(id=next(self._numbers), cancel=pb.Cancel(fill=request.id)).SerializeToString())
            raise
        finally:
            close_files(files)

    async def pin(self, region: pb.RegionRef, pinned: bool = True) -> None:
        await self._ask(pb.Request(pin=pb.Pin(region=region, pinned=pinned)))

    async def evict(self, region: pb.RegionRef) -> None:
        """Takes an unleased region away; with device "", lets a set of chunks in the arena go."""
        await self._ask(pb.Request(evict=pb.Evict(region=region)))

    async def reserve(self, device: str, size: int) -> int:
        """Holds so many bytes of a device from now on, giving the rest back. Returns how many are held."""
        return (await self._ask(pb.Request(reserve=pb.Reserve(device=device, size=size)))).reserved.size

    async def quota(self, namespace: str, size: int) -> None:
        """What a namespace may use of each device; 0: no limit."""
        await self._ask(pb.Request(quota=pb.Quota(namespace=namespace, size=size)))

    async def tenant(self, namespace: str) -> Path:
        """The socket of a namespace; mount its folder into the sandbox."""
        return Path((await self._ask(pb.Request(tenant=pb.Tenant(namespace=namespace)))).tenant.path)

    async def status(self) -> pb.Status:
        return (await self._ask(pb.Request(status=pb.GetStatus()))).status

    async def _ask(self, request: pb.Request, descriptors: Sequence[int] = (), seconds: float | None = ANSWER_SECONDS) -> pb.Reply:
        if self._gone:
            raise PeerGone(self._gone)
        request.id = next(self._numbers)
        waiting = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = waiting
        try:
            async with asyncio.timeout(seconds):
                await self._channel.send(request.SerializeToString(), descriptors)
                reply: pb.Reply = await waiting
        except TimeoutError:
            raise PeerGone(f"gpumem at {self._path} did not answer within {seconds} s: see its log") from None
        except OSError as error:
            raise PeerGone(f"gpumem at {self._path} is gone: {error}") from error
        finally:
            self._waiting.pop(request.id, None)
        if reply.HasField("error"):
            raise from_message(reply.error)
        return reply

    async def _listen(self) -> None:
        why = "it closed the connection"
        try:
            while True:
                frame = await self._channel.receive()
                frame.close()
                reply = pb.Reply.FromString(frame.payload)
                if not reply.id and reply.HasField("error"):
                    why = reply.error.message
                waiting = self._waiting.get(reply.id)
                if waiting is not None and not waiting.done():
                    waiting.set_result(reply)
        except (EOFError, OSError, ProtocolViolation) as error:
            why = str(error) or why
        finally:
            self._gone = f"gpumem at {self._path} is gone: {why}; connect again when it is back"
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(PeerGone(self._gone))
                    waiting.exception()


def _close_opened(opening: asyncio.Future[tuple[pb.Request, list[int]]]) -> None:
    """For whoever stopped waiting for files to be opened."""
    if opening.exception() is None:
        close_files(opening.result()[1])
