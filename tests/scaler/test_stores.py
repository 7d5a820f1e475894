"""`zerowake up` with a store: a second machine serves what the first one took, and never starts it. Machines are state folders here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml
from zerowake_proto import agent_pb2, agent_pb2_grpc

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.fleet.nodes import Nodes
from scaler.fleet.readiness import Readiness
from scaler.gateway.dispatcher import Dispatcher
from scaler.local.config import ModelSection
from scaler.local.look import Look
from scaler.local.stores import Stores
from tests.worlds import fake_agent
from tests.worlds.command import zerowake
from tests.worlds.needs import missing_for_criu
from tests.worlds.ports import free_port
from zerowake_shared.engine_identity import engine_identity

pytestmark = pytest.mark.skipif(bool(missing_for_criu()), reason=missing_for_criu() or "it is there")
ENGINE = Path(__file__).parents[1] / "worlds" / "hashing_engine.py"
PORT = 8000


class Machine:
    """A folder with a `zerowake up` in it while `up` lasts."""

    def __init__(self, folder: Path, store: str, model: Path) -> None:
        self.folder, self.store, self.model = folder, store, model
        self.state = folder / "state"
        self.url = ""
        self.env: dict[str, str] = {}
        folder.mkdir()

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        start = f"echo started >> {self.model}/starts; exec {sys.executable} {ENGINE} {PORT} 4 {self.model}/weights.bin"
        section = {
            "snapshot": "tiny",
            "command": ["/bin/sh", "-c", start],
            "port": PORT,
            "canary": "/sum",
            "directory": "/",
            "env": self.env,
            "shared": [str(self.model)],
            "max_wait_seconds": 60,
            "cooldown_seconds": 1,
            "polling_seconds": 0.2,
        }
        settings = {"state": "state", "store": self.store, "listen": f"127.0.0.1:{port}", "drain_seconds": 5, "models": {"tiny": section}}
        (self.folder / "up.yaml").write_text(yaml.safe_dump(settings))
        with (self.folder / "up.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "scaler.programs.cli", "up", str(self.folder / "up.yaml")), stdout=log, stderr=log
            )
        try:
            yield
        finally:
            process.terminate()
            await asyncio.wait_for(process.wait(), 30)

    async def until(self, said: str) -> None:
        async with asyncio.timeout(60):
            while said not in self.log:
                await asyncio.sleep(0.05)  # a log has no stream

    async def until_rung(self, rung: str) -> None:
        async with asyncio.timeout(60):
            while [each["rung"] for each in (await self.status())["models"]] != [rung]:
                await asyncio.sleep(0.05)  # the status has no stream

    async def status(self) -> Any:
        return json.loads(await zerowake("status", "--json", "--state", str(self.state)))

    @property
    def log(self) -> str:
        return (self.folder / "up.log").read_text()

    @property
    def starts(self) -> int:
        return len((self.model / "starts").read_text().splitlines())

    async def origin_of_an_answer(self) -> str:
        async with asyncio.timeout(60), aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.get(f"{self.url}/models/tiny/sum") as response:
                        assert response.status == 200, await response.text()
                        await response.read()
                        break
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.05)  # until it listens
        (activation,) = (await self.status())["activations"]
        return str(activation["origin"])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights.bin").write_bytes(os.urandom(1 << 20))
    return tmp_path / "model"


@pytest.fixture
def folder_store(tmp_path: Path) -> str:
    (tmp_path / "remote").mkdir()
    return f"file://{tmp_path}/remote"


async def two_machines(tmp_path: Path, store: str, model: Path) -> Machine:
    one, two = Machine(tmp_path / "one", store, model), Machine(tmp_path / "two", store, model)
    async with one.up():
        await one.until("its snapshot was put into")
    starts = one.starts
    assert starts >= 1
    (public,) = [line.split()[-1] for line in (await zerowake("key", "list", "--state", str(one.state))).splitlines() if "signs" in line]
    await zerowake("key", "trust", public, "--state", str(two.state))
    async with two.up():
        assert await two.origin_of_an_answer() == "restored", "the first request waits for the fetch, and for no start"
    assert two.starts == starts, "the second machine has never started it"
    return two


async def test_a_second_machine_serves_from_a_folder_and_takes_no_old_snapshot(tmp_path: Path, folder_store: str, model: Path) -> None:
    two = await two_machines(tmp_path, folder_store, model)
    await zerowake("snapshot", "rm", "tiny", "--state", str(two.state))
    await zerowake("key", "make", "--state", str(two.state))  # to trust another's makes none
    two.env = {"CHANGED": "yes"}
    starts = two.starts
    async with two.up():
        await two.until("that is not for this machine: it was taken of another command, other variables")
        await two.until("its snapshot was put into")
    assert two.starts > starts


async def test_one_that_has_left_the_disk_for_others_is_fetched_again_by_the_next_start(
    tmp_path: Path, folder_store: str, model: Path
) -> None:
    one = Machine(tmp_path / "one", folder_store, model)
    async with one.up():
        await one.until("its snapshot was put into")
    starts = one.starts
    (one.folder / "up.log").unlink()
    async with one.up():
        await one.until("its snapshot is here and in")
        async with grpc.aio.insecure_channel(f"unix:{one.state}/agent.sock") as channel:
            gone = agent_pb2.UnstageRequest(request_id="gone", snapshot=agent_pb2.SnapshotRef(name="tiny"), rung=agent_pb2.RUNG_ABSENT)
            assert (await agent_pb2_grpc.AgentStub(channel).Unstage(gone)).residency.rung == agent_pb2.RUNG_ABSENT
        await one.until_rung("absent")  # the scaler has heard of it
        assert await one.origin_of_an_answer() == "restored"
        assert "MB have come from" in one.log
    assert one.starts == starts


async def test_a_second_machine_serves_from_a_bucket(tmp_path: Path, bucket: str, model: Path) -> None:
    await two_machines(tmp_path, f"s3://{bucket}/fleet", model)


async def test_a_store_that_is_away_keeps_nothing_from_serving(tmp_path: Path, model: Path) -> None:
    one = Machine(tmp_path / "one", f"file://{tmp_path}/remote", model)
    async with one.up():
        await one.until("its snapshot was taken in")
        await one.until("it is tried again in")
        assert await one.origin_of_an_answer() == "restored"
        (tmp_path / "remote").mkdir()
        await one.until("its snapshot was put into")


async def test_what_is_not_trusted_is_neither_taken_nor_overwritten(tmp_path: Path, folder_store: str, model: Path) -> None:
    one, stranger = Machine(tmp_path / "one", folder_store, model), Machine(tmp_path / "two", folder_store, model)
    async with one.up():
        await one.until("its snapshot was put into")
    name = next((tmp_path / "remote/names").rglob("*.json")).read_bytes()
    async with stranger.up():
        await stranger.until("not trusted here")
        await stranger.until("it is tried again in")
        assert await stranger.origin_of_an_answer() == "restored"
    assert next((tmp_path / "remote/names").rglob("*.json")).read_bytes() == name


async def test_of_a_snapshot_that_does_not_fit_the_agent_is_asked_all_the_same() -> None:
    """It refuses it, and brings what the cold start finds that comes now. One of another command is not asked for."""
    section = ModelSection(snapshot="default/tiny", command=("serve",), port=PORT)
    identity = engine_identity(section.command, section.env, str(section.directory.resolve()))
    agent, nodes, looks = fake_agent.Agent("one"), Nodes(Readiness(Dispatcher(Ledger())), Activations()), {"tiny": Look(), "other": Look()}
    agent.find_fails, agent.refuse = None, grpc.StatusCode.FAILED_PRECONDITION
    reference = agent_pb2.SnapshotRef(namespace="default", name="tiny", digest="ab" * 32)
    agent.in_store = agent_pb2.FindResponse(snapshot=reference, template_hash=identity, unfit_reason="it was taken with another driver")
    sections = {"tiny": section, "other": section.model_copy(update={"command": ("serve", "else")})}
    async with agent.serve() as address, nodes.follow(address):
        keeping = asyncio.create_task(Stores("s3://bucket/fleet", sections, nodes, address, looks).keep())
        try:
            async with asyncio.timeout(60):
                await asyncio.gather(*(look.done.wait() for look in looks.values()))
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])
    (asked,) = agent.staged
    assert (asked.snapshot.digest, list(asked.stores), asked.rung) == ("ab" * 32, ["s3://bucket/fleet"], agent_pb2.RUNG_DISK)
