"""The executor: what is under way, what is given up, what is put off. Agents are stood in for at the seam of their calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import pytest
from prometheus_client import REGISTRY

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.agent import AgentError, AgentSilent, AgentUnreachable, Wanted
from scaler.fleet.executor import Executor
from scaler.fleet.nodes import Nodes
from scaler.fleet.snapshot_peers import SnapshotPeer
from scaler.plan.actions import Drop, End, Keep, Pin, Sleep, Stage, Start
from scaler.plan.policy import Plan
from scaler.plan.rungs import Rung
from scaler.plan.world import Node, Replica, Residency
from tests.worlds.virtual_time import StandingClock
from tests.worlds.waiting import until

NAME = SnapshotName("ns", "chat")
MEMORY = Stage("a", "chat", NAME, "d", Rung.MEMORY, "it waits in memory")
FETCH = Stage("a", "chat", NAME, "d", Rung.DISK, "no node that has it can restore it")
STANDBY = Stage("a", "chat", NAME, "d", Rung.STANDBY, "it waits as a standby")
PARKED = Stage("a", "chat", NAME, "d", Rung.PARKED, "it waits parked")


class StandIn:
    """An agent, and a maker of replicas, whose calls end when the test says so."""

    name = "a"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.given_up: list[str] = []
        self.replicas: list[str] = []
        self.answers: dict[str, asyncio.Future[None]] = {}
        self.peers: Sequence[SnapshotPeer] = ()  # of the last stage
        self.wrongs: Sequence[str] = ()  # of its sources
        self.others: list[Node] = []
        self.residencies: dict[SnapshotName, Residency] = {}
        self.fetched: list[tuple[int, float]] = []

    async def _call(self, what: str) -> None:
        self.calls.append(what)
        self.answers[what] = asyncio.get_running_loop().create_future()
        try:
            await self.answers[what]
        except asyncio.CancelledError:
            self.given_up.append(what)
            raise

    async def stage(
        self,
        snapshot: SnapshotName,
        digest: str,
        rung: Rung,
        peers: Sequence[SnapshotPeer],
        stores: Sequence[str],
        complained: Callable[[str], None],
        *,
        urgent: bool,
    ) -> float:
        self.peers, self.stores, self.urgent = peers, stores, urgent
        for why in self.wrongs:
            complained(why)
        await self._call(f"{rung.name} {digest}")
        return 0.5

    def note_fetch(self, size: int, seconds: float) -> None:
        self.fetched.append((size, seconds))

    async def unstage(
        self, snapshot: SnapshotName, digest: str, *, seconds: float, rung: Rung = Rung.ABSENT, weights: bool = False
    ) -> None:
        if rung > Rung.ABSENT:
            await self._call(f"down to {rung.name} {digest}{' with its weights' if weights else ''}")
        else:
            self.calls.append(f"off {digest}")

    async def pin(self, snapshot: SnapshotName, digest: str, rung: Rung) -> None:
        await self._call(f"pin {rung.name} {digest}")

    async def sleep(self, replica: str, rung: Rung) -> None:
        await self._call(f"{rung.name} {replica}")

    async def start(self, action: Start) -> None:
        await self._call(f"start {action.number}")

    async def end(self, action: End) -> None:
        await self._call(f"end {action.replica}")

    def __iter__(self) -> Iterator[Node]:
        yield Node("a", replicas={name: Replica(name, "chat") for name in self.replicas})
        yield from self.others

    def agent(self, address: str) -> StandIn | None:
        return self if address == "a" else None


class World:
    def __init__(self) -> None:
        self.there = StandIn()
        self.clock = StandingClock(100.0)
        self.failures: list[tuple[str, str]] = []
        self.ended: list[str] = []
        self.executor = Executor(cast(Nodes, self.there), self.there, lambda *failure: self.failures.append(failure), self.clock)
        self.executor.on_end(self.ended.append)
        self.refused: list[tuple[str, ...]] = []
        self.complaints: list[tuple[str, ...]] = []
        self.executor.on_refused(
            lambda stage, node, why: self.refused.append((stage.digest, stage.rung.name, node, why)),
            lambda stage, node, why: self.complaints.append((stage.digest, stage.rung.name, node, why)),
        )

    async def does(self, *actions: Stage | Drop | Pin | Start | End | Keep | Sleep) -> None:
        self.executor.carry_out(Plan(actions))
        await asyncio.sleep(0)  # one turn: what was begun makes its call

    async def answer(self, what: str, error: Exception | None = None) -> None:
        ended = len(self.ended)
        answer = self.there.answers[what]
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(error)
        await until(lambda: len(self.ended) > ended, what)


@pytest.fixture
async def world() -> World:
    return World()


async def test_an_action_is_under_way_until_it_has_ended(world: World) -> None:
    await world.does(MEMORY, Start("chat", "a", "", number=1))
    assert set(world.executor.under_way) == {MEMORY, Start("chat", "a", "", number=1)}
    await world.answer("MEMORY d")
    assert world.executor.under_way == (Start("chat", "a", "", number=1),) and world.ended == ["chat"]
    await world.answer("start 1")
    assert world.executor.under_way == () and world.failures == []


async def test_what_is_staged_has_an_age_and_its_end_is_counted(world: World) -> None:
    def counted(rung: str, result: str) -> float:
        return REGISTRY.get_sample_value("zerowake_plan_stagings_total", {"rung": rung, "result": result}) or 0.0

    done, failed = counted("memory", "done"), counted("disk", "failed")
    await world.does(MEMORY, Start("chat", "a", "", number=1))
    world.clock.moment += 5.0
    await world.does(FETCH)
    world.clock.moment += 1.0
    assert sorted(world.executor.stagings()) == [1.0, 6.0]
    await world.answer("MEMORY d")
    assert world.executor.stagings() == [1.0]
    await world.answer("DISK d", AgentError("no room"))
    assert world.executor.stagings() == []
    assert (counted("memory", "done"), counted("disk", "failed")) == (done + 1, failed + 1)
    await world.does(Drop("a", "chat", NAME, "d", Rung.DISK, ""))
    await world.does(MEMORY)
    world.executor.carry_out(Plan((Drop("a", "chat", NAME, "d", Rung.DISK, ""),)))
    assert world.executor.stagings() == [], "it was given up"


async def test_who_stages_is_told_of_those_that_have_it_and_of_those_that_are_told_with_it(world: World) -> None:
    has = {NAME: Residency("d", Rung.DISK, 100)}
    world.there.others = [
        Node("b", "node-b", synced=True, peer_address="10.0.0.2:9447", residencies=has),
        Node("c", "node-c", synced=True, peer_address="10.0.0.3:9447"),
    ]
    await world.does(MEMORY, replace(MEMORY, node="c"))
    assert world.there.peers == (SnapshotPeer("node-b", "10.0.0.2:9447", True), SnapshotPeer("node-c", "10.0.0.3:9447", False))
    assert world.there.stores == ()


async def test_who_fetches_is_told_of_the_store() -> None:
    world = World()
    await world.does(replace(FETCH, store="s3://b/p"))
    assert world.there.stores == ("s3://b/p",)


async def test_what_a_source_did_wrong_is_told(world: World) -> None:
    world.there.wrongs = ("node-b has other bytes",)
    await world.does(FETCH)
    await world.answer("DISK d")
    assert (world.complaints, world.refused) == ([("d", "DISK", "a", "node-b has other bytes")], [])


async def test_how_fast_a_snapshot_came_is_noted() -> None:
    world = World()
    await world.does(FETCH)
    world.there.residencies[NAME] = Residency("d", Rung.DISK, 100, 50, gpu_bytes=(1, 1))
    world.clock.moment += 4.0
    await world.answer("DISK d")
    assert world.there.fetched == [(200, 4.0)]


async def test_a_snapshot_that_has_come_when_no_model_has_it_any_more_is_taken_off_again(world: World) -> None:
    world.executor.wanted_by(lambda snapshot: False)
    await world.does(FETCH)
    await world.answer("DISK d")
    assert world.there.calls == ["DISK d", "off d"] and world.there.fetched == []


async def test_a_drop_gives_up_what_goes_above_its_rung(world: World) -> None:
    await world.does(MEMORY, STANDBY)
    await world.does(Drop("a", "chat", NAME, "d", Rung.MEMORY, "a request waits"))
    assert world.executor.under_way == (MEMORY,), "at once: the next decision is made without it"
    await until(lambda: world.there.given_up == ["STANDBY d"])


async def test_what_comes_into_memory_waits_until_what_leaves_it_has_left_but_for_a_request(world: World) -> None:
    leaves = Drop("a", "other", SnapshotName("ns", "other"), "e", Rung.DISK, "chat is worth more")
    await world.does(leaves, MEMORY)
    assert world.there.calls == ["down to DISK e"] and world.executor.under_way == (leaves, MEMORY)
    await world.answer("down to DISK e")
    await until(lambda: world.there.calls == ["down to DISK e", "MEMORY d"])
    await world.answer("MEMORY d")
    await world.does(leaves, replace(MEMORY, urgent=True))
    assert world.there.calls[2:] == ["down to DISK e", "MEMORY d"]


async def test_what_an_agent_does_not_take_out_of_memory_keeps_nothing_from_coming(world: World) -> None:
    await world.does(Drop("a", "other", SnapshotName("ns", "other"), "e", Rung.DISK, "chat is worth more", weights=True), MEMORY)
    await world.answer("down to DISK e with its weights", AgentError("it is in use"))
    await until(lambda: world.there.calls == ["down to DISK e with its weights", "MEMORY d"])


async def test_a_start_is_given_up_by_its_number(world: World) -> None:
    first, second = Start("chat", "a", "", number=1), Start("chat", "a", "", number=2)
    await world.does(first, second)
    await world.does(End("chat", "a", "", "one is enough", number=1))
    assert world.executor.under_way == (second,)
    await until(lambda: world.there.given_up == ["start 1"])
    await world.does(End("chat", "a", "r", "none is needed"))
    assert world.there.calls[-1] == "end r"


async def test_an_end_is_given_up_for_a_replica_that_is_wanted_after_all(world: World) -> None:
    one, other = End("chat", "a", "r", "none is needed"), End("chat", "a", "s", "none is needed")
    await world.does(one, other)
    await world.does(Keep("chat", "a", "r", "one is needed"))
    assert world.executor.under_way == (other,)
    await until(lambda: world.there.given_up == ["end r"])


async def test_an_agent_that_falls_silent_over_a_fetch_is_told_and_has_refused_nothing(world: World) -> None:
    await world.does(FETCH)
    await world.answer("DISK d", AgentSilent("nothing for 30 s"))
    assert world.executor.under_way == () and world.ended == ["chat"], "another node can be asked at once"
    assert world.refused == [("d", "DISK", "a", "nothing for 30 s")]
    assert world.executor.put_off == {} and world.executor.refusal("a", "d", Rung.DISK) == "", "its stream says when it is back"


async def test_a_refusal_puts_its_rung_off_for_longer_each_time(world: World) -> None:
    key = ("a", "d", Rung.STANDBY)
    for pause in (30.0, 60.0, 120.0):
        await world.does(STANDBY)
        await world.answer("STANDBY d", AgentError("no memory"))
        assert world.executor.put_off == {key: world.clock.moment + pause}
        assert (world.executor.refusal(*key), world.executor.refusal("a", "d", Rung.PARKED)) == ("no memory", "")
        world.clock.moment += pause
    await world.does(STANDBY)
    await world.answer("STANDBY d")
    assert world.executor.put_off == {}, "it stands there: whatever comes next is a first failure"
    assert world.executor.refusal(*key) == ""
    assert set(world.refused) == {("d", "STANDBY", "a", "no memory")}, "and whoever tells the snapshot's owner is told each time"


async def test_what_an_agent_has_taken_down_is_left_in_peace_for_a_while(world: World) -> None:
    """As after a first refusal, however often it was taken down, or refused, before."""
    key = ("a", "d", Rung.PARKED)
    await world.does(PARKED)
    await world.answer("PARKED d")
    for _ in range(3):
        world.executor.taken_down(*key)
        assert world.executor.put_off == {key: world.clock.moment + 30.0}
        world.clock.moment += 100.0
    for pause in (60.0, 120.0):
        await world.does(PARKED)
        await world.answer("PARKED d", AgentError("no room"))
        assert world.executor.put_off == {key: world.clock.moment + pause}, "what it wanted the room for is still there"
    world.executor.taken_down(*key)
    assert world.executor.put_off == {key: world.clock.moment + 30.0}


async def test_an_agent_that_does_not_answer_has_refused_nothing(world: World) -> None:
    await world.does(MEMORY)
    await world.answer("MEMORY d", AgentUnreachable("connection refused"))
    assert world.executor.put_off == {} and world.executor.refusal("a", "d", Rung.MEMORY) == "" and not world.refused


async def test_starts_that_fail_are_told_and_wait_longer_each_time(world: World) -> None:
    assert world.executor.not_before("chat") < world.clock.moment
    for pause in (0.2, 0.4, 0.8):
        await world.does(Start("chat", "a", "", number=1))
        await world.answer("start 1", AgentError("the engine ended"))
        assert world.executor.not_before("chat") == pytest.approx(world.clock.moment + pause)
    assert world.failures == [("chat", "the engine ended")] * 3
    await world.does(Start("chat", "a", "", number=1))
    await world.answer("start 1")
    assert world.executor.not_before("chat") < world.clock.moment


async def test_a_fault_of_ours_ends_the_action_and_is_not_repeated_at_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    await world.does(MEMORY, Start("chat", "a", "", number=1))
    await world.answer("MEMORY d", RuntimeError("told to fail"))
    await world.answer("start 1", RuntimeError("told to fail, too"))
    assert world.executor.under_way == () and "told to fail, too" in caplog.text
    assert world.executor.put_off == {("a", "d", Rung.MEMORY): world.clock.moment + 30.0}
    assert world.executor.not_before("chat") > world.clock.moment


async def test_a_node_that_has_gone_is_asked_nothing(world: World) -> None:
    await world.does(Stage("gone", "chat", NAME, "d", Rung.MEMORY, ""))
    await until(lambda: world.ended == ["chat"])
    assert world.there.calls == []


async def test_close_gives_up_everything_and_decides_nothing(world: World) -> None:
    await world.does(MEMORY, Start("chat", "a", "", number=1))
    await world.executor.close()
    assert sorted(world.there.given_up) == ["MEMORY d", "start 1"] and world.ended == []


async def test_a_replica_that_is_not_to_sleep_is_asked_again_later_and_forgotten_when_it_is_gone(world: World) -> None:
    sleep = Sleep("a", "chat", "one", Rung.PARKED, "nobody asks it")
    world.there.replicas = ["one"]
    await world.does(sleep)
    assert world.executor.under_way == (sleep,)
    await world.answer("PARKED one", AgentError("a client is connected"))
    assert world.executor.put_off == {("a", "one", Rung.PARKED): 130.0}
    await world.does(sleep)
    await world.answer("PARKED one", AgentUnreachable("it is away"))
    assert world.executor.put_off == {("a", "one", Rung.PARKED): 130.0}, "which has refused nothing"
    await world.does(sleep)
    await world.answer("PARKED one", Wanted("a request has just come"))
    assert world.executor.put_off == {("a", "one", Rung.PARKED): 130.0}, "it is not idle any more"
    await world.does(sleep)
    await world.answer("PARKED one")
    assert world.executor.put_off == {}
    world.there.replicas = ["two"]
    for name in ("one", "two"):
        await world.does(Sleep("a", "chat", name, Rung.PARKED, "nobody asks it"))
        await world.answer(f"PARKED {name}", AgentError("a client is connected"))
    assert list(world.executor.put_off) == [("a", "two", Rung.PARKED)]


async def test_a_pin_that_is_refused_is_asked_for_again_later_and_one_that_is_not_heard_at_once(world: World) -> None:
    pin = Pin("a", "chat", SnapshotName("ns", "chat"), "d", Rung.MEMORY, "its owner wishes so")
    for pause in (30.0, 60.0):
        await world.does(pin)
        await world.answer("pin MEMORY d", AgentError("its disk is read-only"))
        assert world.executor.pins_put_off == {("a", "d", Rung.MEMORY): world.clock.moment + pause}
    assert (world.executor.put_off, world.executor.refusal("a", "d", Rung.MEMORY)) == ({}, ""), "it is staged all the same"
    await world.does(pin)
    await world.answer("pin MEMORY d")
    assert world.executor.pins_put_off == {}
    await world.does(pin)
    await world.answer("pin MEMORY d", AgentUnreachable("gone"))
    assert (world.executor.pins_put_off, world.executor.under_way) == ({}, ())
