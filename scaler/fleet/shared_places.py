"""The places of replicas, shared among all gateways, so that a model's concurrency holds however many gateways there are.

The eldest gateway keeps the book (books/places.py), for itself and for the others, who ask it over a stream each. A place that was granted
stays with its gateway, so most requests take one without asking, and a gateway that is alone asks nobody and keeps no book.

Who is the eldest, each finds out from whom it hears. Two cannot grant at the same time: a new keeper grants nothing before every gateway
that may hold places has told it what it has, and each tells one only. A gateway that has ended (its stream ended well, its port refuses, it
is not listed any more) leaves its places at once: its connections to engines ended with it. One that is silent may live. Each side then
takes no more than its share of a replica (`share`: by rank, the same on both sides, so that all shares together are the concurrency), and
for `TAKE_SECONDS`, in which the other side gets down to its own, no more than it has. What runs is never cut: only requests that have run
since before the break can make it more than the concurrency for a while. A silent one that Kubernetes says is not ready has ended, too.
Rejected: an owner for each replica by a hash (each gateway that comes or goes moves places), a lease in Kubernetes' API as the keeper's
(nothing is granted for 15 s after a crash), asking all others (they have to be counted for that, and one that is silent stops all).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Generic, TypeVar

import grpc
from zerowake_proto import peers_pb2 as pb
from zerowake_proto import peers_pb2_grpc as pb_grpc

from scaler.books.ledger import Ledger
from scaler.books.places import Granted, PlaceBook
from scaler.fleet.member import Hearing, Member
from scaler.fleet.peers import Peers
from scaler.fleet.silence import Silence, share
from zerowake_shared.background import kept, told
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.tls import BadCertificate

log = logging.getLogger(__name__)

TAKE_SECONDS = 10.0
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.02, 1.0


M = TypeVar("M", pb.Ask, pb.Answer)


class _Stream(Generic[M]):
    """What is to be written on a stream; None ends it. granted: places that it brought so far, by model."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[M | None] = asyncio.Queue()
        self.granted: Counter[str] = Counter()

    def put(self, message: M) -> None:
        self._queue.put_nowait(message)

    def end(self) -> None:
        self._queue.put_nowait(None)

    async def messages(self) -> AsyncIterator[M]:
        while (message := await self._queue.get()) is not None:
            yield message


class SharedPlaces:
    """The places that this gateway may use, as its dispatcher asks for them. Until `peers` are followed it is alone, and may use all."""

    def __init__(self, ledger: Ledger, peers: Peers, take_seconds: float = TAKE_SECONDS, clock: Clock = SYSTEM_CLOCK) -> None:
        self._ledger = ledger
        self._peers = peers
        self._me = peers.instance
        self._room: Callable[[str], None] = lambda model: None
        self._alone = True
        self._known = False  # who the others are was found out at least once
        self._used: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._firm: Counter[str] = Counter()  # to be given back
        self._kind: Counter[str] = Counter()  # to be given back where they are idle
        self._models: dict[str, str] = {}  # of replicas
        self._wants: dict[str, tuple[int, frozenset[str]]] = {}
        self._keeper = self._me
        self._link: asyncio.Task[None] | None = None
        self._asks: _Stream[pb.Ask] | None = None  # to the keeper
        self._book: PlaceBook | None = None  # while this is the keeper
        self._joined: dict[str, _Stream[pb.Answer]] = {}
        self._unknown: set[str] = set()  # addresses of those that have not told this keeper what they have
        self._given_up: set[str] = set()  # addresses of those whose places were given up
        self._silence = Silence(take_seconds, clock.now, self._review)
        self._closed = False
        peers.on_members(self._review)
        peers.share = self._share
        ledger.on_declaration(self._settle)

    # --- asked by the dispatcher

    def on_room(self, callback: Callable[[str], None]) -> None:
        """Calls `callback(model)` when there may be a place for a request that is held."""
        self._room = callback

    def room(self, replica: str, concurrency: int, in_flight: int) -> int:
        """How many requests more may be sent to the replica now, of which this gateway has sent it `in_flight`."""
        if self._alone:
            return concurrency - in_flight
        return self._held[replica] - self._firm[replica] - self._used[replica]

    def taken(self, replica: str, model: str) -> None:
        """A request goes to the replica."""
        self._used[replica] += 1
        self._models[replica] = model

    def freed(self, replica: str) -> None:
        """A request has ended there; whoever waits in this gateway was not served yet."""
        self._used[replica] -= 1
        if not self._used[replica]:
            del self._used[replica]
        if self._firm[replica]:
            self._give_back(replica, self._firm[replica])

    def idle(self, replica: str) -> None:
        """Whoever waits was served: what is free there is idle."""
        if self._kind[replica]:
            self._give_back(replica, self._kind[replica])

    def dropped(self, replica: str) -> None:
        """The replica takes no more requests of this gateway: its places go back as they come free."""
        if self._held[replica]:
            self._firm[replica] = self._held[replica]
            self._give_back(replica, self._held[replica])

    def wanted(self, model: str, count: int, replicas: Iterable[str]) -> None:
        """So many requests have no place, and any of these replicas would do."""
        if self._alone:
            return
        want = count, frozenset(replicas if count else ())
        if self._wants.get(model, (0, frozenset())) == want:
            return
        if count:
            self._wants[model] = want
        else:
            self._wants.pop(model, None)
        if self._book is not None:
            self._book.want(self._me, model, *want)
            self._settle(model)
        elif self._asks is not None:
            self._asks.put(pb.Ask(wants=[self._want(model, *want)]))

    # --- what this gateway has

    def _granted(self, model: str, replica: str, count: int) -> None:
        if self._asks is not None:
            self._asks.granted[model] += count
        self._held[replica] += count
        self._models[replica] = model
        self._wants.pop(model, None)  # it is told anew, even if nothing changes: some of it was answered
        if self._firm[replica]:
            self._give_back(replica, self._firm[replica])
        self._room(model)

    def _recalled(self, replica: str, count: int, firm: bool) -> None:
        (self._firm if firm else self._kind)[replica] += count
        self._give_back(replica, count)

    def _give_back(self, replica: str, count: int) -> None:
        count = min(count, self._held[replica] - self._used[replica])
        if count <= 0:
            return
        self._held[replica] -= count
        for asked in (self._firm, self._kind):
            asked[replica] = max(0, asked[replica] - count)
        model = self._models[replica]
        if not self._held[replica]:
            for each in (self._held, self._firm, self._kind):
                del each[replica]
            if not self._used[replica]:
                self._models.pop(replica, None)
        if self._book is not None:
            self._book.give_back(self._me, replica, count)
            self._settle(model)
        elif self._asks is not None:
            self._asks.put(pb.Ask(returns=[pb.Places(model=model, replica=replica, count=count)]))

    def _holds(self) -> list[tuple[str, str, int]]:
        return [(self._models[replica], replica, count) for replica, count in self._held.items() if count]

    def _want(self, model: str, count: int, replicas: frozenset[str]) -> pb.Want:
        granted = self._asks.granted[model] if self._asks is not None else 0
        return pb.Want(model=model, count=count, replicas=sorted(replicas), granted=granted)

    # --- who keeps the book

    def _review(self) -> None:
        """Who is there has changed, or time has passed."""
        if self._closed:
            return
        members = [each for each in self._peers.members() if each.hearing is not Hearing.GONE and not each.shares_none]
        heard = [each for each in members if each.hearing is Hearing.HEARD]
        alone = not members and not self._joined
        keeper = min([(self._peers.born, self._me), *((each.born, each.instance) for each in heard)])[1]
        self._silence.look(members, self._unknown)
        if alone:
            self._become_alone()
        elif keeper != self._keeper or self._alone or (self._book is None and self._link is None):
            self._become(keeper, members)
        self._known = self._known or not any(each.hearing is Hearing.UNASKED for each in members)
        if self._book is not None:
            back = {each.address for each in heard if each.address in self._given_up}  # with what it took meanwhile
            self._given_up = {each.address for each in members if self._silence.is_overdue(each)}
            self._unknown = (self._unknown | back) & {each.address for each in members} - self._given_up
            self._unknown -= {each.address for each in members if each.instance in self._book.gateways()}
            there = {each.instance for each in members if each.address not in self._given_up}
            for gateway in self._book.gateways() - there - self._joined.keys() - {self._me}:
                self._book.leave(gateway)
            self._silence.look(members, self._unknown)
            for model in self._book.models():
                self._settle(model)

    def _become_alone(self) -> None:
        if self._alone:
            return
        self._leave_role()
        self._keeper, self._alone = self._me, True
        for counts in (self._held, self._firm, self._kind):
            counts.clear()
        self._wants.clear()
        for model in self._ledger.models():
            self._room(model)

    def _become(self, keeper: str, members: list[Member]) -> None:
        """`keeper` keeps the book from now on."""
        goes_on = self._alone and self._known  # whoever is alone has kept all there is to keep
        if self._alone:
            self._held = Counter(self._used)
        self._leave_role()
        self._alone, self._keeper = False, keeper
        self._firm.clear()
        self._kind.clear()
        if keeper == self._me:
            self._book = PlaceBook(self._capacity, self._withheld)
            self._book.join(self._me, self._holds())
            self._unknown = set() if goes_on else {each.address for each in members}
        else:
            address = next(each.address for each in members if each.instance == keeper)
            name = f"places from the peer at {address}"
            self._link = asyncio.create_task(kept(lambda: self._ask(address), name, log), name=name)
        log.info("the gateway that hands out places is %s", "this one" if keeper == self._me else f"at {address}")
        for model in self._ledger.models():
            self._wants.pop(model, None)
            self._room(model)

    def _leave_role(self) -> None:
        if self._link is not None:
            self._link.cancel()
            self._link = self._asks = None
        self._book = None
        for stream in self._joined.values():
            stream.end()
        self._joined.clear()

    def close(self) -> None:
        """Asks nobody any more, and hands out nothing."""
        self._closed = True
        self._leave_role()
        self._silence.close()

    # --- as the one that asks

    async def _ask(self, address: str) -> None:
        backoff = Backoff(_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS)
        while True:
            asks = self._asks = _Stream[pb.Ask]()
            self._firm.clear()
            self._kind.clear()
            holds = [pb.Places(model=model, replica=replica, count=count) for model, replica, count in self._holds()]
            asks.put(pb.Ask(instance=self._me, holds=holds, wants=[self._want(model, *want) for model, want in self._wants.items()]))
            try:
                async with self._peers.channel(address) as channel:
                    async for answer in pb_grpc.PeersStub(channel).Share(asks.messages()):
                        backoff.reset()
                        for granted in answer.grants:
                            self._granted(granted.model, granted.replica, granted.count)
                        for recall in answer.recalls:
                            self._recalled(recall.replica, recall.count, recall.firm)
            except (grpc.aio.AioRpcError, BadCertificate) as error:
                why = error.details() if isinstance(error, grpc.aio.AioRpcError) else error
                log.info("the peer at %s hands out no places now, asking again: %s", address, why)
            finally:
                asks.end()
            await asyncio.sleep(backoff.next())

    # --- as the keeper

    async def _share(self, asks: AsyncIterator[pb.Ask]) -> AsyncIterator[pb.Answer]:
        """Answers one gateway for as long as it asks and this one keeps the book."""
        try:
            first = await anext(aiter(asks))
        except StopAsyncIteration:
            return
        stream = self._joined[first.instance] = _Stream[pb.Answer]()
        self._review()
        if self._book is None or self._joined.get(first.instance) is not stream:
            self._joined.pop(first.instance, None)
            return  # it has heard of somebody going, or coming, sooner than this one: it asks again
        self._book.join(first.instance, [(each.model, each.replica, each.count) for each in first.holds])
        self._review()
        reader = asyncio.create_task(self._read(first, asks, stream), name=f"places for {first.instance}")
        told(reader, log)
        try:
            async for answer in stream.messages():
                yield answer
        finally:
            reader.cancel()
            if self._joined.get(first.instance) is stream:
                del self._joined[first.instance]
                self._review()

    async def _read(self, ask: pb.Ask, asks: AsyncIterator[pb.Ask], stream: _Stream[pb.Answer]) -> None:
        gateway = ask.instance
        try:
            while self._book is not None and self._joined.get(gateway) is stream:
                models = {each.model for each in (*ask.holds, *ask.returns)} | {each.model for each in ask.wants}
                for back in ask.returns:
                    self._book.give_back(gateway, back.replica, back.count)
                for want in ask.wants:
                    self._book.want(gateway, want.model, want.count - (stream.granted[want.model] - want.granted), want.replicas)
                for model in models:
                    self._settle(model)
                ask = await anext(aiter(asks))
        except (StopAsyncIteration, grpc.RpcError, grpc.aio.UsageError):
            pass
        finally:
            stream.end()

    def _settle(self, model: str) -> None:
        if self._book is None:
            return
        answers: dict[str, pb.Answer] = {}
        for said in self._book.settle(model):
            if said.gateway == self._me:
                if isinstance(said, Granted):
                    self._granted(model, said.replica, 1)
                else:
                    self._recalled(said.replica, 1, said.firm)
                continue
            answer = answers.setdefault(said.gateway, pb.Answer())
            if isinstance(said, Granted):
                answer.grants.append(pb.Places(model=model, replica=said.replica, count=1))
            else:
                answer.recalls.append(pb.Recall(model=model, replica=said.replica, count=1, firm=said.firm))
        for gateway, answer in answers.items():
            if stream := self._joined.get(gateway):
                stream.granted[model] += len(answer.grants)
                stream.put(answer)

    def _capacity(self, model: str) -> int | None:
        return self._ledger.limits(model).concurrency if self._ledger.knows(model) else None

    # --- those that are silent

    def _withheld(self, replica: str, places: int) -> tuple[int, int]:
        assert self._book is not None
        theirs = 0
        for member in self._peers.members():
            if member.hearing is Hearing.SILENT and not member.shares_none:
                has = self._book.held(member.instance).get(replica, 0)
                theirs += max(0, self._share_of(member.address, replica, places) - has)
        return (places if self._unknown else theirs), theirs

    def _share_of(self, address: str, replica: str, places: int) -> int:
        there = [each.address for each in self._peers.members() if each.hearing is not Hearing.GONE and not each.shares_none]
        return share(address, replica, places, [self._peers.address, *there])
