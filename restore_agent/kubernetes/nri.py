"""The agent as a plugin of its node's container runtime (NRI): asked before each container is made, it may change what is made.

containerd and CRI-O listen for plugins on a socket. A plugin registers, says which events it wants, and is asked for as long as it stays
connected, in ttrpc (ttrpc.py). A runtime skips what it does not know of an answer, and says nothing: so one that is too old to take a
seccomp policy of a plugin (NRI before 0.10) is refused as it introduces itself, by its version.

A plugin stands in the way of every container of its node, so whatever goes wrong here leaves a container as it is: a runtime that waits
for an answer in vain goes on after two seconds and drops us. Rejected: volumes in the pod for what a container needs from its node, since
the kubelet looks only every 300 ms whether a pod's volumes are there, and Pod Security forbids hostPath to most tenants.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from zerowake_proto import nri_pb2, ttrpc_pb2

from restore_agent.errors import AgentError
from restore_agent.kubernetes import ttrpc
from zerowake_shared.background import beside
from zerowake_shared.backoff import Backoff

SOCKET = Path("/run/nri/nri.sock")
_NAME, _INDEX = "zerowake", "90"  # late: what it sees is what is made
_RUNTIME = "nri.pkg.api.v1alpha1.Runtime"  # the service that plugins call
_REGISTER_SECONDS = 5.0
_SYNCHRONIZE_SECONDS = 60.0  # the runtime first finishes what it is making, and lists all that there is
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 1.0  # before it connects again
_LOG = logging.getLogger("zerowake.agent")

_SINCE = {"containerd": (2, 2), "cri-o": (1, 34)}  # the first versions with NRI 0.10

Adjust = Callable[[nri_pb2.PodSandbox, nri_pb2.Container], nri_pb2.ContainerAdjustment | None]


class NriError(AgentError):
    """The runtime cannot be reached as a plugin, or does not take this one."""


@contextlib.asynccontextmanager
async def plugged(socket: Path, adjust: Adjust) -> AsyncIterator[None]:
    """`adjust` is asked about each container of the node that is made within the block; None leaves it as it is.

    It is called in the event loop, and must be quick. A connection that is lost is made again.

    Raises:
        NriError: the runtime does not take plugins.
    """
    plugin = _Plugin(socket, adjust)
    connection = await plugin.registered()
    async with beside(plugin.stay(connection), "plugin of the container runtime"):
        yield


class _Plugin:
    """What the runtime sees: it registers over the socket, and answers."""

    def __init__(self, socket: Path, adjust: Adjust) -> None:
        self._socket = socket
        self._adjust = adjust
        self._asked: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # done: of every container from now on

    async def registered(self) -> ttrpc.Connection:
        """A connection over which the runtime asks from now on. Raises NriError."""
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._socket))
        except OSError as error:
            raise NriError(
                f"the container runtime takes no plugins at {self._socket}: {error.strerror}; enable NRI in its configuration "
                "(containerd 2.2 and later have it on by default), or name its socket with --nri"
            ) from None
        self._asked = asyncio.get_running_loop().create_future()
        connection = ttrpc.Connection(reader, writer, self._answer)
        async with contextlib.AsyncExitStack() as unless_registered:
            unless_registered.push_async_callback(connection.aclose)
            try:
                async with asyncio.timeout(_REGISTER_SECONDS) as patience:
                    about = nri_pb2.RegisterPluginRequest(plugin_name=_NAME, plugin_idx=_INDEX)
                    status = (await connection.call(_RUNTIME, "RegisterPlugin", about)).status
                    if status.code:
                        raise NriError(f"the container runtime refuses this plugin: {status.message}")
                    patience.reschedule(asyncio.get_running_loop().time() + _SYNCHRONIZE_SECONDS)
                    either: list[asyncio.Future[Any]] = [self._asked, connection.ended]
                    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                    await (self._asked if self._asked.done() else connection.ended)
            except TimeoutError:
                raise NriError(f"the container runtime did not answer in time at {self._socket}") from None
            except ttrpc.TtrpcError as error:
                raise NriError(f"the container runtime {error}") from None
            unless_registered.pop_all()
        return connection

    async def stay(self, connection: ttrpc.Connection) -> None:
        """Connects again whenever the connection ends, for ever."""
        backoff = Backoff(_FIRST_PAUSE, _LAST_PAUSE)
        while True:
            try:
                async with contextlib.aclosing(connection):
                    await connection.ended
            except ttrpc.TtrpcError as error:
                why = f"the container runtime {error}"
                _LOG.warning("until it is connected to the container runtime again, containers are made without the agent: %s", why)
            while True:
                await asyncio.sleep(backoff.next())  # before a socket that nobody listens on
                try:
                    connection = await self.registered()
                except NriError:
                    continue
                backoff.reset()
                _LOG.info("connected to the container runtime again")
                break

    def _answer(self, request: ttrpc_pb2.Request) -> ttrpc_pb2.Response:
        answer: Message
        match request.method:
            case "Configure":
                about = nri_pb2.ConfigureRequest.FromString(request.payload)
                _LOG.info("plugin of %s %s", about.runtime_name, about.runtime_version)
                if (error := _too_old(about)) and not self._asked.done():
                    self._asked.set_exception(error)
                answer = nri_pb2.ConfigureResponse(events=1 << (nri_pb2.CREATE_CONTAINER - 1))
            case "Synchronize":
                answer = nri_pb2.SynchronizeResponse(more=nri_pb2.SynchronizeRequest.FromString(request.payload).more)
                if not answer.more and not self._asked.done():
                    self._asked.set_result(None)
            case "CreateContainer":
                asked = nri_pb2.CreateContainerRequest.FromString(request.payload)
                answer = nri_pb2.CreateContainerResponse(adjust=self._adjustment(asked))
            case "Shutdown":
                answer = nri_pb2.Empty()
            case _:
                return ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=ttrpc.UNIMPLEMENTED, message=f"{_NAME} has no {request.method}"))
        return ttrpc_pb2.Response(payload=answer.SerializeToString())

    def _adjustment(self, asked: nri_pb2.CreateContainerRequest) -> nri_pb2.ContainerAdjustment | None:
        try:
            return self._adjust(asked.pod, asked.container)
        except Exception:  # the runtime would not make the container
            _LOG.exception("container %s of pod %s/%s is left as it is", asked.container.name, asked.pod.namespace, asked.pod.name)
            return None


def _too_old(runtime: nri_pb2.ConfigureRequest) -> NriError | None:
    since = _SINCE.get(runtime.runtime_name)
    version = re.match(r"v?([0-9]{1,9})\.([0-9]{1,9})", runtime.runtime_version)
    if since is None or version is None or (int(version[1]), int(version[2])) >= since:
        return None
    return NriError(
        f"{runtime.runtime_name} {runtime.runtime_version} takes no seccomp policy of a plugin, without which engines cannot be dumped: "
        f"have version {'.'.join(map(str, since))} or later on this node; until then its pods start as they always did"
    )
