"""Which replica serves a request when replicas die, are drained, or come again."""

import asyncio

from tests.worlds.echo_engine import Engine
from tests.worlds.engine_process import process
from tests.worlds.front import front


async def test_a_request_is_retried_elsewhere_when_its_replica_is_killed() -> None:
    async with process("held") as dying, Engine() as living, front() as f:
        f.dispatcher.add(dying.replica("dying"))
        asked = [f.ask(f"n{i}", stream=bool(i % 2)) for i in range(8)]
        await f.until(lambda demand: demand.in_flight == 8)
        held = f.ask("held")
        await f.held(1)
        f.dispatcher.add(living.replica("living"))
        await dying.kill()
        answers = await asyncio.gather(*asked, held)
        assert [answer.status for answer in answers] == [200] * 9
        assert sorted(living.seen.get_nowait() for _ in answers) == ["held", *(f"n{i}" for i in range(8))]


async def test_held_requests_outlive_a_killed_replica() -> None:
    """The gateway learns of the death from a refused connection, long before any agent says so."""
    async with process() as dead, Engine() as living, front(concurrency=1) as f:
        await dead.kill()
        asked = []
        for i in range(5):
            asked.append(f.ask(f"n{i}"))
            await f.held(i + 1)
        f.dispatcher.add(dead.replica("dead"))
        assert f.ledger.demand("m").in_flight == 1
        await f.held(5)  # its place is given back; nobody else is sent there
        f.dispatcher.add(living.replica("living"))
        f.dispatcher.remove("dead")
        assert [answer.text for answer in await asyncio.gather(*asked)] == [f"n{i}" for i in range(5)]
        assert living.seen.get_nowait() == "n0"  # the retried one goes first


async def test_a_second_failure_is_told() -> None:
    async with process("held") as one, process("held") as two, front(concurrency=1) as f:
        f.dispatcher.add(one.replica("one"))
        asked = f.ask()
        await f.until(lambda demand: demand.in_flight == 1)
        f.dispatcher.add(two.replica("two"))
        await one.kill()
        await f.held(0)
        await f.until(lambda _: f.dispatcher.in_flight("two") == 1)
        await two.kill()
        answer = await asked
        assert (answer.status, answer.error["code"]) == (502, "replica_failed")
        assert f.ledger.demand("m").pending == 0


async def test_draining_a_replica() -> None:
    async with Engine(held=True) as old, Engine() as new, front() as f:
        f.dispatcher.add(old.replica("old"))
        asked = f.ask("x")
        await old.seen.get()
        draining = asyncio.create_task(f.dispatcher.drain("old"))
        await f.until(lambda demand: demand.replicas == 1 and not f.dispatcher.ready("m"))
        later = f.ask("later")
        await f.held(1)
        f.dispatcher.add(new.replica("new"))
        assert (await later).text == "later"
        assert not draining.done()
        old.say()
        assert (await asked).text == "x"
        await draining
        f.dispatcher.remove("old")
        await f.dispatcher.drain("old")  # gone: nothing to wait for
        assert [replica.id for replica in f.dispatcher.ready("m")] == ["new"]


async def test_the_same_replica_again_changes_nothing() -> None:
    async with Engine(held=True) as engine, Engine() as other, front() as f:
        f.dispatcher.add(engine.replica("r1"))
        asked = f.ask("x")
        await engine.seen.get()
        f.dispatcher.add(engine.replica("r1"))
        assert f.dispatcher.in_flight("r1") == 1
        f.dispatcher.add(other.replica("r1"))  # another engine under the same name: the first one is gone
        assert (await asked).text == "x"
        assert other.seen.get_nowait() == "x"
