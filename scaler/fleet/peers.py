"""What the other replicas of `zerowake serve` have, so that each of them answers KEDA for all.

A request is held by the replica that it reached; KEDA asks, and listens to, any of them. So each replica subscribes to every other's
numbers, and the ledger sums them. The first request of a model is told at once, whatever follows within 20 ms in one message, so a peer
costs at most 50 messages a second and one for each activation, however many requests there are.
Numbers are absolute and belong to a process (`instance`): a new stream begins with all of them and what it does not name is none, so a
restarted peer's old ones vanish with its first message. A stream that breaks keeps its numbers for three seconds, since they are needed
most when the network has a hiccup, and one that ends with OK (the peer has drained) takes them away at once. A peer that is no longer
listed is followed until its stream ends: a pod that is going away is taken off the list first and answers its requests after that.
Rejected: one replica that knows all (an election stands in the way of a first request), a store like Redis (one more thing to run, whose
loss looks like no demand), KEDA asking every replica (it asks one), gossip (two to five replicas: everyone knows everyone).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import grpc
from prometheus_client import Counter, Gauge
from zerowake_proto import peers_pb2 as pb
from zerowake_proto import peers_pb2_grpc as pb_grpc

from scaler.books.ledger import Ledger
from scaler.fleet.addresses import Addresses
from scaler.fleet.member import Flights, Hearing, Member
from scaler.fleet.post import Post
from scaler.fleet.subscriber import Subscriber
from zerowake_shared.address import Address
from zerowake_shared.background import ended, kept
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import SYSTEM_CHANCE, SYSTEM_CLOCK, Clock, token
from zerowake_shared.listening import PINGS_WELCOME, listen
from zerowake_shared.tls import BadCertificate, TlsFiles, client_credentials, server_credentials

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger(__name__)

SERVER_NAME = "zerowake-scaler"  # in every replica's certificate: peers are known by their addresses only
GRACE_SECONDS = 3.0
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.05, 1.0
_TWIN_SECONDS = 2.0
_REFUSAL_SECONDS = 1.0
_PIECE_BYTES = 1 << 20  # of a forecast, a message
_CONNECT_MS = 3000  # gRPC's bound on making a connection, by whatever name
_KEEPALIVE_MS = 2000  # a peer whose machine vanished says nothing: it is given up after twice that

PEERS = Gauge("zerowake_peers_connected", "Other replicas of the scaler whose numbers are known.")
MESSAGES = Counter("zerowake_peer_messages_total", "Messages of other replicas of the scaler that were read.")
LOST = Counter("zerowake_peers_lost_total", "Other replicas whose numbers were dropped because nothing was heard of them.")


class _Peer:
    """One address and what the process there has."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.listed = True
        self.asked = False  # it has told its numbers, or could not be reached
        self.instance = ""
        self.said: tuple[str, float] = "", 0.0  # the last instance, and when it began
        self.hearing = Hearing.UNASKED
        self.demands: dict[str, tuple[int, int]] = {}
        self.begun: dict[str, int] = {}
        self.grace: asyncio.TimerHandle | None = None


class Peers(pb_grpc.PeersServicer):
    """Both sides: tells this ledger's numbers to whoever subscribes, and adds to it what the others tell.

    on_pushed: called with a model of whose use another replica has just told KEDA.
    """

    def __init__(
        self,
        ledger: Ledger,
        tls: TlsFiles | None = None,
        on_pushed: Callable[[str], None] | None = None,
        grace_seconds: float = GRACE_SECONDS,
        clock: Clock = SYSTEM_CLOCK,
        chance: random.Random = SYSTEM_CHANCE,
    ) -> None:
        self.instance = token(chance, 8)
        self.born = clock.wall()
        self.address = ""  # ours, as the others have it, once it is known
        self.share: Callable[[AsyncIterator[pb.Ask]], AsyncIterator[pb.Answer]] | None = None  # answers those who ask for places
        self.forecast: Callable[[], Awaitable[bytes]] | None = None  # all that it knows, for a replica that is new
        self.posts: Callable[[], Iterable[Post]] = tuple  # all that count now
        self.on_post: Callable[[Post], None] = lambda _: None  # hears of those that others have
        self._member_listeners: list[Callable[[], None]] = []
        self._unserving: frozenset[str] = frozenset()
        self._now = clock.now
        self._ledger = ledger
        self._tls = tls
        self._on_pushed = on_pushed
        self._grace = grace_seconds
        self._subscribers: set[Subscriber] = set()
        self._peers: dict[str, _Peer] = {}
        self._closing = False
        ledger.on_change(self._changed)

    def __len__(self) -> int:
        """Peers whose numbers are known."""
        return sum(bool(peer.instance) for peer in self._peers.values())

    @property
    def unheard(self) -> list[str]:
        """Addresses of peers that were not reached so far, nor found to be unreachable: what KEDA is told may lack their numbers."""
        return [address for address, peer in self._peers.items() if peer.listed and not peer.asked]

    def members(self) -> list[Member]:
        """The other replicas that are listed, or still heard."""
        return [
            Member(address, *peer.said, self._standing(address, peer)) for address, peer in self._peers.items() if address != self.address
        ]

    def flights(self, model: str) -> Mapping[str, Flights]:
        """Of each of the others that is heard, by its instance."""
        return {
            peer.instance: Flights(peer.demands.get(model, (0, 0))[1], peer.begun.get(model, 0))
            for peer in self._peers.values()
            if peer.instance and peer.hearing is Hearing.HEARD
        }

    def _standing(self, address: str, peer: _Peer) -> Hearing:
        """One that is silent, and that its own kubelet, or its node's end, says is not there, is gone."""
        gone = peer.hearing is Hearing.SILENT and address in self._unserving
        return Hearing.GONE if gone else peer.hearing

    def on_members(self, callback: Callable[[], None]) -> None:
        """Calls `callback()` when `members` or `address` may have changed."""
        self._member_listeners.append(callback)

    def pushed(self, model: str) -> None:
        """This replica has just told KEDA that the model is in use."""
        for subscriber in self._subscribers:
            subscriber.pushed(model)

    def posted(self, post: Post) -> None:
        """Somebody has posted demand at this replica."""
        for subscriber in self._subscribers:
            subscriber.posted(post)

    @contextlib.asynccontextmanager
    async def serve(self, address: str) -> AsyncIterator[str]:
        """Answers peers until the block ends, then ends their streams with OK; yields the bound address.

        Raises:
            CannotListen: the address is taken or impossible.
            BadCertificate: the TLS files cannot be used.
        """
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
                ("grpc.http2.ping_timeout_ms", _KEEPALIVE_MS),
                ("grpc.http2.max_pings_without_data", 0),
                *PINGS_WELCOME,
            ]
        )
        pb_grpc.add_PeersServicer_to_server(self, server)
        bound = listen(server, address, "the service for peers", server_credentials(self._tls) if self._tls else None)
        await server.start()
        try:
            yield bound
        finally:
            self._closing = True
            for subscriber in self._subscribers:
                subscriber.end()
            await server.stop(grace=1)

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.Update]:
        await self._check(context)
        subscriber = Subscriber(self._now)
        demands = [self._demand(model) for model in self._ledger.demands()]
        subscriber.told(demands)
        self._subscribers.add(subscriber)
        try:
            yield pb.Update(
                instance=self.instance, born=self.born, full=True, demands=demands, posts=[each.message for each in self.posts()]
            )
            while not self._closing:
                changed, pushed, posts = await subscriber.due()
                told = [each.message for each in posts]
                demands = [self._demand(model) for model in changed]
                subscriber.told(demands)
                yield pb.Update(instance=self.instance, born=self.born, demands=demands, pushed=pushed, posts=told)
        finally:
            self._subscribers.discard(subscriber)

    async def Share(self, asks: AsyncIterator[pb.Ask], context: Context) -> AsyncIterator[pb.Answer]:
        await self._check(context)
        if self.share is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this replica hands out no places")
            return
        async for answer in self.share(asks):
            yield answer

    async def Forecast(self, request: pb.ForecastRequest, context: Context) -> AsyncIterator[pb.ForecastPiece]:
        await self._check(context)
        if self.forecast is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this replica has no forecast to tell")
            return
        content = await self.forecast()
        for at in range(0, len(content), _PIECE_BYTES):
            yield pb.ForecastPiece(data=content[at : at + _PIECE_BYTES])

    async def _check(self, context: Context) -> None:
        """Agents have certificates of the same authority, and each of them stands on a node where tenants' pods run."""
        if self._tls is not None and SERVER_NAME.encode() not in context.auth_context().get("x509_common_name", ()):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"the client's certificate is not {SERVER_NAME}'s")

    def _demand(self, model: str) -> pb.Demand:
        demand = self._ledger.own(model)
        return pb.Demand(model=model, held=demand.held, in_flight=demand.in_flight, begun=self._ledger.begun(model))

    def _changed(self, model: str) -> None:
        if self._subscribers:
            pending = self._ledger.own(model).pending > 0
            for subscriber in self._subscribers:
                subscriber.note(model, pending)

    # --- what the others have

    @contextlib.asynccontextmanager
    async def follow(self, addresses: Addresses) -> AsyncIterator[None]:
        """Follows whoever is listed, but for ourselves, until the block ends."""

        def listed(now: frozenset[str]) -> None:
            self._unserving = addresses.unserving
            self._listed(now)

        try:
            with addresses.told_to(listed):
                yield
        finally:
            await ended(peer.task for peer in self._peers.values() if peer.task)
            for peer in self._peers.values():
                self._drop(peer)

    def _listed(self, addresses: frozenset[str]) -> None:
        for address, peer in list(self._peers.items()):
            peer.listed = address in addresses
            if not peer.listed and not peer.instance:
                self._forget(address, peer)
        for address in addresses - self._peers.keys():
            peer = self._peers[address] = _Peer()
            name, follow = f"following the peer at {address}", functools.partial(self._follow, address, peer)
            peer.task = asyncio.create_task(kept(follow, name, log), name=name)
        self._members_changed()

    def _members_changed(self) -> None:
        for callback in self._member_listeners:
            callback()

    def _hears(self, peer: _Peer, hearing: Hearing) -> None:
        if peer.hearing is not hearing:
            peer.hearing = hearing
            self._members_changed()

    async def _follow(self, address: str, peer: _Peer) -> None:
        backoff = Backoff(_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS)
        while peer.listed:
            twin = False
            try:
                async with self.channel(address) as channel:
                    async for update in pb_grpc.PeersStub(channel).Watch(pb.WatchRequest(instance=self.instance)):
                        peer.asked = True
                        backoff.reset()
                        if update.instance == self.instance:
                            self.address = address
                            self._members_changed()
                            return  # this is ourselves, and stays so for as long as it is listed
                        if any(other.instance == update.instance for other in self._peers.values() if other is not peer):
                            twin = True  # one process at two addresses counts once
                            self._hears(peer, Hearing.GONE)
                            break
                        self._apply(peer, update)
                    else:
                        self._drop(peer)
                        self._hears(peer, Hearing.GONE)
            except (grpc.aio.AioRpcError, BadCertificate) as error:
                if peer.instance or not peer.asked:
                    why = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
                    log.warning("the peer at %s is not heard of, trying again: %s", address, why)
                peer.asked = True
                self._lost(peer)
                self._hears(peer, Hearing.GONE if await _refuses(address) else Hearing.SILENT)
            except Exception:  # a task that ended would leave the peer's last numbers standing for ever
                log.exception("what the peer at %s said is of no use; asking it again", address)
                peer.asked = True
                self._lost(peer)
                self._hears(peer, Hearing.SILENT)
            await asyncio.sleep(_TWIN_SECONDS if twin else backoff.next())
        self._forget(address, peer)

    def channel(self, address: str) -> grpc.aio.Channel:
        """To a peer. Raises: BadCertificate."""
        options = [
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.min_reconnect_backoff_ms", _CONNECT_MS),
            ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
            ("grpc.http2.ping_timeout_ms", _KEEPALIVE_MS),  # else a minute, where the other side's kernel still acknowledges
            ("grpc.http2.max_pings_without_data", 0),
        ]
        if self._tls is None:
            return grpc.aio.insecure_channel(address, options)
        # Made anew for every try, so that a renewed certificate counts.
        return grpc.aio.secure_channel(address, client_credentials(self._tls), [*options, ("grpc.ssl_target_name_override", SERVER_NAME)])

    def _apply(self, peer: _Peer, update: pb.Update) -> None:
        MESSAGES.inc()
        if not peer.instance:
            PEERS.inc()
        peer.instance = update.instance
        if peer.said != (update.instance, update.born):
            peer.said, peer.hearing = (update.instance, update.born), Hearing.UNASKED
        self._hears(peer, Hearing.HEARD)
        if peer.grace is not None:
            peer.grace.cancel()
            peer.grace = None
        told = {demand.model: (demand.held, demand.in_flight) for demand in update.demands}
        if update.full:
            told = dict.fromkeys(peer.demands.keys() - told.keys(), (0, 0)) | told
            peer.begun.clear()
        peer.begun.update((demand.model, demand.begun) for demand in update.demands)
        self._set(peer, told)
        for post in update.posts:
            self.on_post(Post.told(post))
        if self._on_pushed:
            for model in update.pushed:
                self._on_pushed(model)

    def _set(self, peer: _Peer, demands: Mapping[str, tuple[int, int]]) -> None:
        for model, (held, in_flight) in demands.items():
            held_before, in_flight_before = peer.demands.pop(model, (0, 0))
            if held or in_flight:
                peer.demands[model] = held, in_flight
            if (held, in_flight) != (held_before, in_flight_before):
                self._ledger.add_remote(model, held - held_before, in_flight - in_flight_before)

    def _lost(self, peer: _Peer) -> None:
        """Its numbers count for a little longer."""
        if not peer.instance or peer.grace is not None:
            return
        if not peer.listed:
            self._drop(peer)
            return

        def give_up() -> None:
            log.warning("nothing was heard of a peer for %.1f s: its requests are not counted any more", self._grace)
            LOST.inc()
            self._drop(peer)

        peer.grace = asyncio.get_running_loop().call_later(self._grace, give_up)

    def _drop(self, peer: _Peer) -> None:
        if peer.grace is not None:
            peer.grace.cancel()
            peer.grace = None
        if peer.instance:
            PEERS.dec()
        peer.instance = ""
        peer.begun.clear()
        self._set(peer, dict.fromkeys(peer.demands, (0, 0)))

    def _forget(self, address: str, peer: _Peer) -> None:
        self._drop(peer)
        if self._peers.get(address) is peer:
            del self._peers[address]
        if peer.task is not None and peer.task is not asyncio.current_task():
            peer.task.cancel()
        self._members_changed()


async def _refuses(address: str) -> bool:
    """Whether the machine is there and nothing listens: the process that did has ended. Anything else may be the network's."""
    try:
        async with asyncio.timeout(_REFUSAL_SECONDS):
            _, writer = await asyncio.open_connection(*Address.parse(address))
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError, ValueError):
        return False
    writer.close()
    return False
