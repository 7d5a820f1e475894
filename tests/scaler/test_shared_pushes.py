"""Demand that is posted at one of two replicas, which tell each other over real connections."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from scaler.books.demand import Elsewhere
from scaler.fleet.post import Post
from scaler.sources.push_declaration import PushDeclaration
from scaler.sources.shared_pushes import SharedPushes
from scaler.sources.source import Reading
from scaler.sources.watch import Sources
from tests.worlds.gateways import MODEL, Site, gateways
from tests.worlds.waiting import until

OURS = PushDeclaration(type="push", by="b")


class Replica:
    """A site with what was posted. owner: whose the model is, as it knows."""

    def __init__(self, site: Site, sources: Sources) -> None:
        self.site = site
        self.sources = sources
        self.owner = "tenant"
        self.pushes = SharedPushes(sources, site.peers, lambda _: self.owner)

    def declare(self) -> None:
        self.sources.declare(MODEL, [OURS])
        self.pushes.declared(MODEL)

    def post(self, pending: int, seconds: float = 60.0) -> bool:
        return self.pushes.told(MODEL, OURS, Reading(pending), seconds)

    @property
    def told(self) -> Elsewhere:
        return self.site.ledger.demand_anywhere(MODEL).elsewhere

    async def says(self, pending: int) -> None:
        await until(lambda: self.told == Elsewhere(pending), f"{self.site.name} knows of {pending}")


@asynccontextmanager
async def replicas() -> AsyncIterator[tuple[Replica, Replica]]:
    async with gateways(2) as sites, AsyncExitStack() as stack:
        here, other = [Replica(site, await stack.enter_async_context(Sources(site.ledger))) for site in sites]
        yield here, other


async def test_a_post_is_known_to_all_and_the_latest_counts() -> None:
    async with replicas() as (here, other):
        assert not here.post(7), "nothing is declared"
        here.declare()
        other.declare()
        assert here.post(7)
        await other.says(7)
        assert other.post(3)
        await here.says(3)
        assert here.post(0)
        await other.says(0)


async def test_what_was_posted_outlives_who_was_told_it() -> None:
    async with replicas() as (here, other):
        here.declare()
        other.declare()
        here.post(7)
        await other.says(7)
        await here.site.die()
        await until(lambda: not other.site.peers.flights(MODEL), "it is gone")
        assert other.told == Elsewhere(7)


async def test_it_counts_for_its_time_alone() -> None:
    async with replicas() as (here, other):
        here.declare()
        other.declare()
        here.post(7)
        await other.says(7)
        here.post(7, seconds=1)
        for each in (here, other):
            await until(lambda each=each: "was not heard of lately" in each.told.unknown, "it is over")  # type: ignore[misc]


async def test_whoever_hears_of_the_model_later_has_it_all_the_same() -> None:
    async with replicas() as (here, other):
        other.owner = ""
        here.declare()
        here.post(7)
        await until(lambda: [*other.site.peers.posts()], "it was told")
        assert other.told == Elsewhere()
        other.owner = "tenant"
        other.declare()
        assert other.told == Elsewhere(7)
        other.declare()
        assert other.told == Elsewhere(7), "its sources were declared anew"


async def test_one_that_comes_back_is_told_of_what_counts_still() -> None:
    async with replicas() as (here, other):
        here.declare()
        other.declare()
        here.site.relay.silence(True)
        here.post(7)
        assert "was not heard of so far" in other.told.unknown
        here.site.relay.silence(False)
        await other.says(7)


async def test_of_a_model_that_is_anothers_now_nothing_counts() -> None:
    async with replicas() as (here, _):
        here.declare()
        here.post(7)
        here.owner = "other"
        here.declare()
        assert "was not heard of so far" in here.told.unknown


async def test_an_earlier_post_that_comes_later_does_not_count() -> None:
    async with replicas() as (here, _):
        here.declare()
        here.post(7)
        (mine,) = here.site.peers.posts()
        for stamp in (mine.stamp - 1, mine.stamp):
            here.site.peers.on_post(Post("tenant", MODEL, "b", 5, stamp, 60.0))
        assert here.told == Elsewhere(7)
        here.site.peers.on_post(Post("tenant", MODEL, "b", 5, mine.stamp + 100, 60.0))
        assert here.told == Elsewhere(5)
        here.post(2)
        assert here.told == Elsewhere(2), "whoever posts here is later than all that is known of him, whatever the clocks say"
        (mine,) = here.site.peers.posts()
        assert mine.pending == 2
