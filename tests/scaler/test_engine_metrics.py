"""What engines count of themselves, by pages such as vLLM's and SGLang's: what of it counts, and silent, slow, wrong, gone and back."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.gateway.dispatcher import Backend, Dispatcher, Endpoint
from scaler.sources.engine_metrics import EngineDeclaration
from tests.worlds.asked_elsewhere import OFTEN, asked_elsewhere, silent_and_back
from tests.worlds.metrics_engine import MetricsEngine, metrics_engine, sglang, vllm
from tests.worlds.network_namespace import network_namespace
from tests.worlds.s3_server import Wire


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[MetricsEngine]:
    with metrics_engine(tmp_path / "page") as made:
        yield made


@pytest.fixture
async def dispatcher() -> AsyncIterator[Dispatcher]:
    made = Dispatcher(Ledger({"m": ModelLimits()}))
    yield made
    await made.close()


def declared(**fields: Any) -> EngineDeclaration:
    return EngineDeclaration(**{"type": "engine", "interval_seconds": OFTEN} | fields)


def replica(engine: MetricsEngine, name: str = "r1", netns: str = "") -> Backend:
    return Backend(name, "m", Endpoint("127.0.0.1", engine.port, netns))


async def test_an_engine_elsewhere_counts_whole(engine: MetricsEngine) -> None:
    async with asked_elsewhere(declared(url=engine.url)) as asked:
        await asked.says(0)
        engine.shows(vllm("3.0", "2.0"))
        await asked.says(5)
        engine.shows(sglang("4", "1"))
        await asked.says(5)
        engine.shows(sglang("0", "1"))
        await asked.says(1)


async def test_of_a_replica_counts_what_the_gateway_does_not_have_at_it(
    engine: MetricsEngine, dispatcher: Dispatcher, tmp_path: Path
) -> None:
    async with asked_elsewhere(declared(), dispatcher=dispatcher) as asked:
        await asked.says(0)  # there is no replica, whom nobody can ask
        dispatcher.add(replica(engine))
        engine.shows(vllm("0", "3"))
        await asked.says(3)
        members = [dispatcher.take("m") for _ in range(2)]
        await asked.says(1)
        members += [dispatcher.take("m") for _ in range(2)]
        await asked.says(0)  # the engine's page is a moment old
        with metrics_engine(tmp_path / "second") as second:
            second.shows(vllm("1", "1"))
            dispatcher.add(replica(second, "r2"))
            await asked.says(2)
            dispatcher.remove("r2")
            await asked.says(0)
        for member in members:
            assert member
            dispatcher.release(member)
        await asked.says(3)
        dispatcher.remove("r1")
        await asked.says(0)


async def test_a_replica_in_a_network_of_its_own(dispatcher: Dispatcher, tmp_path: Path) -> None:
    with network_namespace() as name, metrics_engine(tmp_path / "page", ("ip", "netns", "exec", name)) as engine:
        engine.shows(vllm("2", "0"))
        dispatcher.add(replica(engine, netns=f"/run/netns/{name}"))
        async with asked_elsewhere(declared(), dispatcher=dispatcher) as asked:
            await asked.says(2)


async def test_silent_and_back(engine: MetricsEngine, dispatcher: Dispatcher) -> None:
    engine.shows(vllm("0", "3"))
    dispatcher.add(replica(engine))
    await silent_and_back(declared(), engine.process.pid, pending=3, dispatcher=dispatcher)


async def test_killed_and_back(engine: MetricsEngine, tmp_path: Path) -> None:
    engine.shows(vllm("0", "3"))
    async with asked_elsewhere(declared(url=engine.url)) as asked:
        await asked.says(3)
        engine.process.kill()
        await asked.fails("Connect call failed")
        assert asked.told.pending == 3, "the last value holds"
        engine.process.wait()
        with metrics_engine(tmp_path / "second", port=engine.port):
            await asked.says(0)


async def test_slow_is_not_silent(engine: MetricsEngine) -> None:
    wire = Wire(engine.port)
    wire.rate = 3000  # bytes a second: a page takes a quarter of one
    engine.shows(vllm("0", "3"))
    async with wire.laid(), asked_elsewhere(declared(url=f"{wire.endpoint}/metrics")) as asked:
        await asked.says(3)


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (vllm("NaN", "1"), "vllm:num_requests_waiting nan is no number of requests"),
        (vllm("5", "-2"), "vllm:num_requests_running -2 is no number of requests"),
        (vllm("+Inf", "1"), "inf is no number of requests"),
        (vllm("many", "1"), "its metrics cannot be read"),
        ("vllm:num_requests_running 1\n", "it has no vllm:num_requests_waiting"),
        ("<html>welcome</html>", "it has neither vllm:num_requests_waiting nor sglang:num_queue_reqs"),
        ("", "status 404 in place of a page of metrics"),
    ],
)
async def test_lies(engine: MetricsEngine, page: str, why: str) -> None:
    engine.shows(page)
    async with asked_elsewhere(declared(url=engine.url)) as asked:
        await asked.fails(why)
        assert why in asked.told.unknown


async def test_a_replica_that_fails_is_named(engine: MetricsEngine, dispatcher: Dispatcher, tmp_path: Path) -> None:
    dispatcher.add(replica(engine))
    engine.shows("")
    with metrics_engine(tmp_path / "second") as second:
        dispatcher.add(replica(second, "r2"))
        async with asked_elsewhere(declared(), dispatcher=dispatcher) as asked:
            await asked.fails("replica r1: status 404")
