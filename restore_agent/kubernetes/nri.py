"""The agent as a plugin of its node's container runtime (NRI): asked before each container is made, it may change what is made.

containerd 2 and CRI-O listen for plugins on a socket. A plugin registers, says which events it wants, and is asked for as long as it stays
connected. One connection carries two: the runtime's calls to us, and ours to it, each a ttrpc stream of its own in frames with its number.
There is no library of it for Python; of ttrpc only unary calls are needed.

A plugin stands in the way of every container of its node, so whatever goes wrong here leaves a container as it is: a runtime that waits
for an answer in vain goes on after two seconds and drops us. Rejected: volumes in the pod for what a container needs from its node, since
the kubelet looks only every 300 ms whether a pod's volumes are there, and Pod Security forbids hostPath to most tenants.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from google.protobuf.message import DecodeError, Message
from zerowake_proto import nri_pb2, ttrpc_pb2

from restore_agent.errors import AgentError
from zerowake_shared.backoff import Backoff

SOCKET = Path("/run/nri/nri.sock")
_NAME, _INDEX = "zerowake", "90"  # late: what it sees is what is made
_API = "nri.pkg.api.v1alpha1"
_TO_PLUGIN, _TO_RUNTIME = 1, 2  # the two connections within the one
_FRAME = struct.Struct(">II")  # connection, bytes
_HEADER = struct.Struct(">IIBB")  # bytes, stream, kind, flags
_REQUEST, _RESPONSE = 1, 2
_UNIMPLEMENTED = 12
_LARGEST = (4 << 20) + _HEADER.size
_REGISTER_SECONDS = 5.0
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 5.0  # before it connects again
_LOG = logging.getLogger("zerowake.agent")

Adjust = Callable[[nri_pb2.PodSandbox, nri_pb2.Container], nri_pb2.ContainerAdjustment | None]


class NriError(AgentError):
    """The runtime cannot be reached as a plugin, or said what is no NRI."""


@contextlib.asynccontextmanager
async def plugged(socket: Path, adjust: Adjust) -> AsyncIterator[None]:
    """`adjust` is asked about each container of the node that is made within the block; None leaves it as it is.

    It is called in the event loop, and must be quick. A connection that is lost is made again.

    Raises:
        NriError: the runtime does not take plugins.
    """
    connection = await _Connection.registered(socket, adjust)
    staying = asyncio.create_task(_stay(connection, socket, adjust), name="plugin of the container runtime")
    try:
        yield
    finally:
        staying.cancel()
        await asyncio.gather(staying, return_exceptions=True)


async def _stay(connection: _Connection, socket: Path, adjust: Adjust) -> None:
    backoff = Backoff(_FIRST_PAUSE, _LAST_PAUSE)
    while True:
        try:
            async with contextlib.aclosing(connection):
                await connection.ended
        except NriError as error:
            _LOG.warning("until it is connected to the container runtime again, containers are made without the agent: %s", error)
        while True:
            await asyncio.sleep(backoff.next())  # before a socket that nobody listens on
            try:
                connection = await _Connection.registered(socket, adjust)
            except NriError:
                continue
            backoff.reset()
            _LOG.info("connected to the container runtime again")
            break


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, adjust: Adjust) -> None:
        self._reader = reader
        self._writer = writer
        self._adjust = adjust
        self._received: defaultdict[int, bytearray] = defaultdict(bytearray)
        self._answered: asyncio.Future[ttrpc_pb2.Response] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.create_task(self._serve(), name="calls of the container runtime")

    @classmethod
    async def registered(cls, socket: Path, adjust: Adjust) -> _Connection:
        """Raises NriError."""
        try:
            reader, writer = await asyncio.open_unix_connection(str(socket))
        except OSError as error:
            raise NriError(
                f"the container runtime takes no plugins at {socket}: {error.strerror}; enable NRI in its configuration "
                "(containerd 2 has it on by default), or name its socket with --nri"
            ) from None
        connection = cls(reader, writer, adjust)
        try:
            async with asyncio.timeout(_REGISTER_SECONDS):
                await connection._register()
        except TimeoutError:
            await connection.aclose()
            raise NriError(f"the container runtime did not answer at {socket} within {_REGISTER_SECONDS:.0f} s") from None
        except BaseException:
            await connection.aclose()
            raise
        return connection

    async def aclose(self) -> None:
        self.ended.cancel()
        await asyncio.gather(self.ended, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _register(self) -> None:
        about = nri_pb2.RegisterPluginRequest(plugin_name=_NAME, plugin_idx=_INDEX)
        request = ttrpc_pb2.Request(service=f"{_API}.Runtime", method="RegisterPlugin", payload=about.SerializeToString())
        self._send(_TO_RUNTIME, 1, _REQUEST, request)
        self.ended.add_done_callback(self._give_up)
        status = (await self._answered).status
        if status.code:
            raise NriError(f"the container runtime refuses this plugin: {status.message}")

    def _give_up(self, ended: asyncio.Task[None]) -> None:
        if not self._answered.done() and not ended.cancelled() and (error := ended.exception()):
            self._answered.set_exception(error)

    async def _serve(self) -> None:
        """Until the runtime hangs up. Raises NriError, always."""
        try:
            while True:
                number, size = _FRAME.unpack(await self._reader.readexactly(_FRAME.size))
                if size > _LARGEST:
                    raise NriError(f"the container runtime sends a frame of {size} bytes")
                self._received[number] += await self._reader.readexactly(size)
                self._take(number, self._received[number])
        except (OSError, EOFError) as error:
            raise NriError(f"the container runtime has hung up ({type(error).__name__})") from None
        except DecodeError as error:
            raise NriError(f"the container runtime sends what cannot be read: {error}") from None

    def _take(self, number: int, received: bytearray) -> None:
        """The messages that are whole by now."""
        while len(received) >= _HEADER.size:
            size, stream, kind, _ = _HEADER.unpack_from(received)
            if size > _LARGEST:
                raise NriError(f"the container runtime sends a message of {size} bytes")
            if len(received) < _HEADER.size + size:
                return
            message = bytes(received[_HEADER.size : _HEADER.size + size])
            del received[: _HEADER.size + size]
            if number == _TO_PLUGIN and kind == _REQUEST:
                self._send(number, stream, _RESPONSE, self._answer(ttrpc_pb2.Request.FromString(message)))
            elif number == _TO_RUNTIME and kind == _RESPONSE and not self._answered.done():
                self._answered.set_result(ttrpc_pb2.Response.FromString(message))

    def _answer(self, request: ttrpc_pb2.Request) -> ttrpc_pb2.Response:
        answer: Message
        match request.method:
            case "Configure":
                about = nri_pb2.ConfigureRequest.FromString(request.payload)
                _LOG.info("plugin of %s %s", about.runtime_name, about.runtime_version)
                answer = nri_pb2.ConfigureResponse(events=1 << (nri_pb2.CREATE_CONTAINER - 1))
            case "Synchronize":
                answer = nri_pb2.SynchronizeResponse(more=nri_pb2.SynchronizeRequest.FromString(request.payload).more)
            case "CreateContainer":
                asked = nri_pb2.CreateContainerRequest.FromString(request.payload)
                answer = nri_pb2.CreateContainerResponse(adjust=self._adjustment(asked))
            case "Shutdown":
                answer = nri_pb2.Empty()
            case _:
                status = ttrpc_pb2.Status(code=_UNIMPLEMENTED, message=f"{_NAME} has no {request.method}")
                return ttrpc_pb2.Response(status=status)
        return ttrpc_pb2.Response(payload=answer.SerializeToString())

    def _adjustment(self, asked: nri_pb2.CreateContainerRequest) -> nri_pb2.ContainerAdjustment | None:
        try:
            return self._adjust(asked.pod, asked.container)
        except Exception:  # the runtime would not make the container
            _LOG.exception("container %s of pod %s/%s is left as it is", asked.container.name, asked.pod.namespace, asked.pod.name)
            return None

    def _send(self, number: int, stream: int, kind: int, message: Message) -> None:
        payload = message.SerializeToString()
        self._writer.write(_FRAME.pack(number, _HEADER.size + len(payload)) + _HEADER.pack(len(payload), stream, kind, 0) + payload)
