"""Who answers at an engine's port while the engine sleeps: its processes stand still, and the world must not take it for dead.

    a probe: GET or HEAD of its health path, or of what the kubelet's probes ask for    →  200, in the engine's place
    connected and gone again (a TCP probe)                                              →  nothing
    anything else                                                                       →  the engine is woken, and gets the connection

It accepts from the engine's own listening sockets, which it has open as well (listening.py): nothing listens anew, no address changes, and
what has connected before it looks, or after it has stopped, is nobody's loss, as the kernel keeps it for whoever accepts next. A connection
that was accepted here cannot be given to the engine, so its bytes are passed on; the engine sees its own machine as the client.
Rejected: redirecting the port in the pod's network (a rule that an agent which is killed leaves behind), an engine that goes on running and
is told to be quiet (each would have to be made for that), probes that are changed as the pod is made (they are its owner's).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Collection

from restore_agent.engine.engine import Engine
from restore_agent.engine.listening import listening_sockets
from zerowake_shared.background import ended, told
from zerowake_shared.lack import passes

_HEAD_BYTES = 16 << 10  # of a request; a longer one is no probe
_HEAD_SECONDS = 5.0  # for a client that has begun to ask; then it is no probe
_METHODS = (b"GET ", b"HEAD ")
_PIECE = 1 << 16
_AGAIN_SECONDS = 0.2
_LOG = logging.getLogger("zerowake.agent")


class Doorkeeper:
    """At the port of an engine that stands still. It accepts until `stop`.

    Where the agent lacks descriptors for a moment it tries again: who connects meanwhile waits with the kernel.
    """

    def __init__(self, engine: Engine, probed: Collection[str], wanted: Callable[[], Awaitable[None]]) -> None:
        """`probed`: targets of probes. `wanted`: wakes the engine, returns once it is awake, and raises where it cannot be."""
        self._engine = engine
        self._probed = {engine.record.health_path, *probed}
        self._wanted = wanted
        self._listeners: list[socket.socket] = []
        self._clients: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self._listen()

    def stop(self) -> None:
        """Accepts no more: who connects from now on is the engine's. Those that were accepted are served to their end."""
        if self._again:
            self._again.cancel()
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()

    async def close(self) -> None:
        """Cuts those as well."""
        self.stop()
        await ended(self._clients)

    def _listen(self) -> None:
        """By the engine's sockets, which are taken where that was not done yet."""
        try:
            if not self._listeners:
                hosts = [host for pid, host in self._engine.place.host_pids().items() if pid != 1]
                self._listeners = listening_sockets(hosts, self._engine.record.port)
        except OSError as error:
            self._rest(error)
            return
        self._again = None
        for listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)

    def _rest(self, error: OSError) -> None:
        """Instead of trying without a pause."""
        if not self._again:
            _LOG.warning("nobody who asks %s, which sleeps, is heard for a moment: %s", self._engine.called, error)
        for listener in self._listeners:
            self._loop.remove_reader(listener)
        self._again = self._loop.call_later(_AGAIN_SECONDS, self._listen)

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()  # it does not block: one waits, and nobody else accepts
        except BlockingIOError:
            return  # it has gone again
        except OSError as error:
            if passes(error):
                self._rest(error)
            return
        client.setblocking(False)
        task = self._loop.create_task(self._serve(client), name=f"a client of {self._engine.called}, which sleeps")
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)
        told(task, _LOG)

    async def _serve(self, client: socket.socket) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=client)
        except OSError:
            client.close()
            return
        try:
            with contextlib.suppress(OSError):
                head = await _head(reader)
                if self._is_probe(head):
                    said = b"asleep\n"
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n" % len(said))
                    writer.write(b"Connection: close\r\n\r\n" + (said if head.startswith(b"GET") else b""))
                    await writer.drain()
                elif head:
                    await self._pass_on(head, reader, writer)
        finally:
            writer.close()

    def _is_probe(self, head: bytes) -> bool:
        words = head.split(b"\r\n", 1)[0].split()
        return head.startswith(_METHODS) and head.endswith(b"\r\n\r\n") and len(words) == 3 and words[1].decode("latin-1") in self._probed

    async def _pass_on(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """To the engine, once it is awake."""
        try:
            await self._wanted()
        except Exception as error:  # whatever it is, the client is told
            said = f"the engine sleeps, and could not be woken: {error}\n".encode()
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nRetry-After: 1\r\nConnection: close\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n" % len(said) + said)
            await writer.drain()
            return
        its_reader, its_writer = await self._engine.connect()
        try:
            its_writer.write(head)
            async with asyncio.TaskGroup() as both:
                both.create_task(_copy(reader, its_writer))
                both.create_task(_copy(its_reader, writer))
        finally:
            its_writer.close()


async def _head(reader: asyncio.StreamReader) -> bytes:
    """What a client has said when it is clear what it wants; empty: nothing, and it has gone."""
    said = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_HEAD_SECONDS) as patience:
            while not said.endswith(b"\r\n\r\n") and len(said) < _HEAD_BYTES:
                if not said:
                    patience.reschedule(None)  # one that says nothing wants nothing
                piece = await reader.read(_PIECE)
                if not piece:
                    break
                if not said:
                    patience.reschedule(asyncio.get_running_loop().time() + _HEAD_SECONDS)
                said += piece
                if not any(said.startswith(method[: len(said)]) for method in _METHODS):
                    break
    return said


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(_PIECE):
            writer.write(piece)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
