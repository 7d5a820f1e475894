"""The restore agent as a program, wired together: a node (which makes its own parts), gRPC over it, metrics beside it.

metrics  ←  node  ←  service  ←  gRPC: a UNIX socket for root, TCP with mTLS for the scaler
            node  ←  sharing: TCP with mTLS, for other agents
            node  ←  beside: on_kubernetes.py, where the node is one of a cluster
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import stat
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from zerowake_proto import agent_pb2_grpc

from restore_agent.errors import AgentError
from restore_agent.places.processes import ends_with
from restore_agent.sequences.memory_budget import all_of_it
from restore_agent.sequences.node import Node
from restore_agent.sequences.offering import Offering
from restore_agent.sequences.parked_budget import Share, a_tenth
from restore_agent.service import metrics
from restore_agent.service.authorization import OnlyTheScaler
from restore_agent.service.service import AgentService
from restore_agent.transfer.egress import Egress
from restore_agent.transfer.exchange import Exchange
from restore_agent.transfer.offers import Offers
from restore_agent.transfer.peer import Peers
from restore_agent.transfer.peer_server import PeerServer
from zerowake_shared import background, listening
from zerowake_shared.tls import TlsFiles, client_contexts, server_context, server_credentials

DEFAULT_STATE = Path("/var/lib/zerowake")
_STOP_SECONDS = 5.0
_READERS = 32  # other agents' streams that are served at once
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000
_LOG = logging.getLogger("zerowake.agent")


class CannotRun(AgentError):
    """The agent cannot run here; says why and what to do."""


def socket_of(state: Path) -> Path:
    return state / "agent.sock"


def enter_own_mounts(state: Path) -> None:
    """Gives this process a mount namespace of its own, with a tmpfs for staged skeletons: it goes with the process, however it ends.

    Without root nothing is staged, and so nothing is mounted. Call it before any other thread exists. Raises CannotRun, OSError.
    """
    memory = _memory(state)
    memory.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)

    def done(what: str, failed: int) -> None:
        if failed:
            raise CannotRun(f"the agent cannot {what}: {os.strerror(ctypes.get_errno())}; it needs CAP_SYS_ADMIN")

    done("enter a mount namespace of its own", libc.unshare(_CLONE_NEWNS))
    done("make its mounts private", libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    done(f"mount a tmpfs on {memory}", libc.mount(b"tmpfs", os.fsencode(memory), b"tmpfs", 0, b"mode=700"))


def die_with_parent(parent: int) -> None:
    """This process is told to stop (SIGTERM) when `parent` ends, however that ends: whoever comes after it needs the state folder.

    Raises:
        CannotRun: it has ended already.
    """
    if not ends_with(parent, signal.SIGTERM):
        raise CannotRun(f"the program that started this agent, pid {parent}, has ended")


@dataclass(frozen=True)
class Listen:
    """TCP, for a scaler on another machine. `tls`: tls.crt, tls.key, ca.crt."""

    address: str  # HOST:PORT
    tls: Path


@dataclass(frozen=True)
class Sharing:
    """Snapshots for other agents, and from them."""

    address: str  # HOST:PORT
    tls: Path  # as Listen has it
    rate: float  # bytes a second that all of them get


@contextlib.asynccontextmanager
async def serving(
    name: str,
    state: Path,
    gpumem: Path,
    listen: Listen | None = None,
    parked: Share = a_tenth,
    keys: Path | None = None,
    sharing: Sharing | None = None,
    images: Share = all_of_it,
    disk: Share = all_of_it,
) -> AsyncIterator[Node]:
    """Serves an agent's gRPC on its socket, which only root may open, and where others reach it. `enter_own_mounts` comes first.

    Raises StoreBusy, UnusableKey, BadCertificate, CannotListen, CannotRun, OSError.
    """
    path = socket_of(state)
    async with Node.open(name, state, _memory(state), gpumem, metrics, parked, keys, images, disk) as node, _shared(node, sharing):
        listening.check_threads("the agent")
        listening.make_way(path, "the agent")  # of one that was killed: the store's lock says that none is alive
        server = grpc.aio.server(interceptors=[OnlyTheScaler()], options=listening.PINGS_WELCOME)
        agent_pb2_grpc.add_AgentServicer_to_server(AgentService(node), server)
        listening.listen(server, f"unix:{path}", "the agent")
        if listen:
            listening.listen(server, listen.address, "the agent", server_credentials(TlsFiles.in_folder(listen.tls)))
        path.chmod(stat.S_IRUSR | stat.S_IWUSR)  # before anybody is answered
        await server.start()
        try:
            yield node
        finally:
            await server.stop(_STOP_SECONDS)
            path.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _shared(node: Node, sharing: Sharing | None) -> AsyncIterator[None]:
    """The node exchanges snapshots with other agents until the block ends. Raises BadCertificate, CannotListen."""
    if sharing is None:
        yield
        return
    files = TlsFiles.in_folder(sharing.tls)
    offers, egress = Offers(Offering(node.store, node.staging.chunk)), Egress(sharing.rate, _READERS)
    stack = contextlib.ExitStack()
    try:
        peers = stack.enter_context(Peers(client_contexts(files)))
        server = stack.enter_context(PeerServer.listening(sharing.address, server_context(files), offers, egress))
        metrics.count_sent(egress)
        node.travel.exchange = Exchange(node.name, offers, peers, server.port)
        yield
    finally:
        node.travel.exchange = None
        await asyncio.to_thread(stack.close)


async def run(
    name: str,
    state: Path,
    gpumem: Path,
    metrics_address: tuple[str, int] | None,
    listen: Listen | None = None,
    beside: Callable[[Node], Coroutine[Any, Any, None]] | None = None,
    parked: Share = a_tenth,
    keys: Path | None = None,
    sharing: Sharing | None = None,
    images: Share = all_of_it,
    disk: Share = all_of_it,
) -> None:
    """Until SIGTERM or SIGINT, and with it what runs `beside`, for ever. Raises what `serving` and `beside` do."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if listen:  # before the node is opened, which takes a second
        listening.check_free(listen.address, "the agent")
        server_credentials(TlsFiles.in_folder(listen.tls))
    if sharing:
        listening.check_free(sharing.address, "the server for other agents")
    async with contextlib.AsyncExitStack() as stack:
        if metrics_address:
            await stack.enter_async_context(metrics.serve(*metrics_address))
        node = await stack.enter_async_context(serving(name, state, gpumem, listen, parked, keys, sharing, images, disk))
        stack.enter_context(metrics.shown(node))
        _LOG.info("agent of node %s serves on %s", name, socket_of(state))
        if beside:
            await stack.enter_async_context(background.beside(beside(node), "beside the node"))
        await stop.wait()


def _memory(state: Path) -> Path:
    return state / "memory"
