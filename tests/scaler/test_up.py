"""`zerowake up` as a user runs it: one file, real snapshots, real requests from zero, and parts of it killed on the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from openai import AsyncOpenAI

from scaler.forecast.state_file import load
from tests.worlds.command import zerowake
from tests.worlds.ports import free_port
from tests.worlds.processes import alive, below
from tests.worlds.redis_server import redis_server
from tests.worlds.waiting import blocking_until, until

PORT = 8000
"""Every replica listens here, in a net namespace of its own."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for CRIU and namespaces")


@dataclass
class System:
    process: asyncio.subprocess.Process
    url: str
    metrics: str
    state: Path
    session: aiohttp.ClientSession

    async def ask(self, model: str = "tiny") -> Any:
        async with self.session.get(f"{self.url}/models/{model}/count") as response:
            assert response.status == 200, await response.text()
            return await response.json()

    async def status(self) -> Any:
        process = await zerowake("status", "--json", "--state", str(self.state))
        return json.loads(process)

    async def until(self, **wanted: int | str) -> Any:
        """Waits for a model to be so."""
        async with asyncio.timeout(60), aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.state / "status.sock"))) as session:
            while True:
                async with session.get("http://zerowake/") as response:
                    (model,) = (await response.json())["models"]
                if all(model[key] == value for key, value in wanted.items()):
                    return model
                await asyncio.sleep(0.05)  # status has no stream

    def agent_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(int(pid) for pid in children if b"agent" in Path(f"/proc/{pid}/cmdline").read_bytes())


SERVER, QUIESCING = (Path(__file__).parents[1] / "worlds" / name for name in ("hashing_engine.py", "quiescing_engine.py"))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with a snapshot, taken by the command line."""
    folder = tmp_path_factory.mktemp("up")
    (folder / "weights.bin").write_bytes(os.urandom(1 << 20))
    state = folder / "state"
    command = [sys.executable, str(SERVER), str(PORT), "8", str(folder / "weights.bin")]
    said = asyncio.run(
        zerowake("snapshot", "create", "tiny", "--state", str(state), "--port", str(PORT), "--canary", "/sum", "--", *command)
    )
    assert "proved" in said
    return state


@pytest.fixture(scope="module")
def parkable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of an engine that takes part in the control directory."""
    state = tmp_path_factory.mktemp("parkable") / "state"
    command = [sys.executable, str(QUIESCING), str(PORT)]
    said = asyncio.run(
        zerowake("snapshot", "create", "tiny", "--state", str(state), "--port", str(PORT), "--canary", "/well", "--", *command)
    )
    assert "proved" in said
    return state


async def begun(
    state: Path, port: int, metrics: int, model: dict[str, Any], prefix: tuple[str, ...] = (), **more: Any
) -> asyncio.subprocess.Process:
    """more: of the file, beside the model."""
    file = state.parent / "up.yaml"
    defaults = {"snapshot": "tiny", "cooldown_seconds": 0.5, "polling_seconds": 0.2, "max_wait_seconds": 30}
    file.write_text(
        yaml.safe_dump(
            {
                "state": "state",
                "listen": f"127.0.0.1:{port}",
                "metrics": f"127.0.0.1:{metrics}",
                "drain_seconds": 5,
                "models": {"tiny": defaults | model},
            }
            | more
        )
    )
    command = [*prefix, sys.executable, "-m", "scaler.programs.cli", "up", str(file)]
    with (state.parent / "up.log").open("ab") as log:
        return await asyncio.create_subprocess_exec(*command, stderr=log, stdout=log)


@contextlib.asynccontextmanager
async def system(state: Path, model: dict[str, Any], prefix: tuple[str, ...] = (), **more: Any) -> AsyncIterator[System]:
    """One that is ready. more: of the file, beside the model."""
    port, metrics = free_port(), free_port()
    process = await begun(state, port, metrics, model, prefix, **more)
    async with aiohttp.ClientSession() as session:
        made = System(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}", state, session)
        try:
            await listens(made)
            yield made
        finally:
            if made.process.returncode is None:
                made.process.terminate()
            await asyncio.wait_for(made.process.wait(), 30)


async def listens(made: System) -> None:
    async with asyncio.timeout(60):
        while not await ready(made):
            await asyncio.sleep(0.02)  # until it listens


async def ready(made: System) -> bool:
    try:
        async with made.session.get(f"{made.metrics}/readyz") as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False


async def test_from_zero_to_an_answer_and_back(state: Path) -> None:
    async with system(state, {"cooldown_seconds": 4}) as made:
        assert await made.until(wanted=0, ready=0)
        assert (await made.ask())["count"] >= 1
        status = await made.status()
        assert [replica["origin"] for replica in status["replicas"]] == ["restored"]
        (activation,) = status["activations"]
        assert activation["outcome"] == "served"
        assert {"held", "pushed", "scheduled", "image", "first_byte", "unaccounted"} <= set(activation["phases"])
        assert sum(activation["phases"].values()) == pytest.approx(activation["seconds"], abs=0.01)
        await made.until(wanted=0, ready=0)
        plan = json.loads(await zerowake("plan", "--json", "--state", str(made.state)))
        (there,) = plan["models"][0]["stands"]
        assert (there["rung"] in ("disk", "memory"), there["seconds"] > 0, plan["put_off"]) == (True, True, [])
        why = await zerowake("plan", "--why", "tiny", "--state", str(made.state))
        assert "chance:" in why and "NODE" in why
        async with made.session.get(f"{made.metrics}/metrics") as response:
            shown = await response.text()
        for name in (
            "zerowake_held_requests",
            "zerowake_activation_phase_seconds_bucket",
            "zerowake_keda_streams_open",
            "zerowake_requests_total",
            "zerowake_forecast_statements_total",
            "zerowake_ahead_active 0.0",
        ):
            assert name in shown
        async with made.session.get(f"{made.metrics}/events") as response:
            assert await response.content.readline() == b"event: state\n"
            told = json.loads((await response.content.readuntil(b"\n")).removeprefix(b"data: "))
        assert [(each["name"], each["rung"]) for each in told["models"]] == [("tiny", there["rung"])]
        assert [(each["id"], each["origin"]) for each in told["activations"]] == [(activation["id"], "restored")]
    assert made.process.returncode == 0
    kept = load(state / "forecast")
    assert kept and (kept.models, kept.rows["ended"].sum()) == (("tiny",), 1.0), "a restart knows of that request"


async def test_a_backlog_gets_its_replicas_at_once(state: Path) -> None:
    async with system(state, {"max_replicas": 3, "concurrency": 2, "cooldown_seconds": 5}) as made:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(made.session.get(f"{made.url}/models/tiny/sum")) for _ in range(6)]
            await made.until(ready=3)
        assert {task.result().status for task in asked} == {200}


async def test_the_agent_killed_while_requests_wait(state: Path) -> None:
    async with system(state, {}) as made:
        waiting = [asyncio.create_task(made.ask()) for _ in range(5)]
        os.kill(made.agent_pid(), signal.SIGKILL)
        answers = await asyncio.gather(*waiting)
        assert len(answers) == 5
        await made.until(wanted=0, ready=0)
        assert (await made.ask())["count"] >= 1


async def test_an_agent_that_cannot_be_started_again_at_once(state: Path) -> None:
    async with system(state, {}) as made:
        pid, log = made.process.pid, state.parent / "up.log"
        before, said = resource.prlimit(pid, resource.RLIMIT_NOFILE), log.stat().st_size
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
        os.kill(made.agent_pid(), signal.SIGKILL)
        await until(lambda: "the restore agent cannot be started again" in log.read_text()[said:], "the log says so")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert (await made.ask())["count"] >= 1


@pytest.mark.parametrize("seconds", [0, 0.2, 0.4, 0.8, 1.6])
async def test_an_agent_ends_with_whoever_started_it_however_soon_that_is_killed(state: Path, seconds: float) -> None:
    """Also one that is still being imported: it stays for nobody, and the next `zerowake up` gets its folder."""
    process = await begun(state, free_port(), free_port(), {})

    def agents() -> list[int]:
        return [pid for _, pid, words in below(process.pid) if " agent " in words]

    await until(agents, "its agent is begun")
    begun_agents = agents()
    await asyncio.sleep(seconds)  # at whatever moment of its start
    process.kill()
    await process.wait()
    await until(lambda: not any(map(alive, begun_agents)), "its agent has ended")


async def test_killed_and_started_again_before_its_agent_has_ended(state: Path) -> None:
    """Whose metrics have their port for that long."""
    agent_metrics = f"127.0.0.1:{free_port()}"
    async with system(state, {}, agent_metrics=agent_metrics) as made:
        earlier = made.agent_pid()
        os.kill(earlier, signal.SIGSTOP)
        try:
            made.process.kill()
            await made.process.wait()
            port, metrics = (int(url.rpartition(":")[2]) for url in (made.url, made.metrics))
            process = await begun(state, port, metrics, {}, agent_metrics=agent_metrics)
            made.process = process
            log = state.parent / "up.log"
            await until(lambda: process.returncode is not None or f"waiting for pid {earlier} " in log.read_text(), "it has begun")
        finally:
            os.kill(earlier, signal.SIGCONT)
        assert process.returncode is None, log.read_text()
        await listens(made)
        assert (await made.ask())["count"] >= 1
        assert made.agent_pid() != earlier


async def test_the_engine_killed_while_requests_wait(state: Path) -> None:
    """`/exit` ends it in the middle of a request; that request is tried once more, the others are answered by the next replica."""
    async with system(state, {"concurrency": 1, "cooldown_seconds": 5}) as made:
        await made.ask()
        fatal = asyncio.create_task(made.session.get(f"{made.url}/models/tiny/exit"))
        waiting = [asyncio.create_task(made.ask()) for _ in range(4)]
        assert len(await asyncio.gather(*waiting)) == 4
        assert (await fatal).status in (502, 503)


async def test_a_snapshot_that_is_gone_is_a_cold_start(state: Path) -> None:
    command = [sys.executable, str(SERVER), str(PORT), "8", str(state.parent / "weights.bin")]
    async with system(state, {"snapshot": "missing", "command": command, "port": PORT, "cooldown_seconds": 30}) as made:
        await made.ask()
        (replica,) = (await made.status())["replicas"]
        assert replica["origin"] == "cold"
        assert "no snapshot default/missing" in replica["detail"]


async def test_without_root_everything_is_started_cold(state: Path) -> None:
    """A user namespace without a mapping: the files are ours, but nothing else is."""
    port = free_port()
    command = [sys.executable, str(SERVER), str(port), "8", str(state.parent / "weights.bin")]
    cold = {"command": command, "port": port, "cooldown_seconds": 30, "max_replicas": 2, "concurrency": 1}
    async with system(state, cold, prefix=("unshare", "--user")) as made:
        await asyncio.gather(*(made.ask() for _ in range(4)))
        (replica,) = (await made.status())["replicas"]
        assert replica["origin"] == "cold"
        assert "root" in replica["detail"]
        await made.ask()


async def test_a_model_that_cannot_start_says_why(state: Path) -> None:
    broken = {"snapshot": "", "command": ["/bin/sh", "-c", "echo no weights here; exit 3"], "port": PORT, "max_wait_seconds": 1.5}
    async with system(state, broken) as made, made.session.get(f"{made.url}/models/tiny/count") as response:
        assert response.status == 503
        assert "Retry-After" in response.headers
        assert "no weights here" in await response.text()


async def test_a_model_that_never_starts_keeps_nobody_waiting(state: Path) -> None:
    """Not for all of `max_wait_seconds`, which is 300 here: its failed starts are counted, and told at once from then on."""
    broken = {"snapshot": "", "command": ["/bin/sh", "-c", "echo no weights here; exit 3"], "port": PORT}
    async with system(state, broken) as made, asyncio.timeout(60):
        for _ in range(2):
            async with made.session.get(f"{made.url}/models/tiny/count") as response:
                assert response.status == 503
                error = (await response.json())["error"]
            assert error["code"] == "cannot_start"
            assert "no weights here" in error["message"]


async def test_stopping_drains(state: Path) -> None:
    async with system(state, {}) as made:
        waiting = asyncio.create_task(made.ask())
        async with asyncio.timeout(10):
            while not (await made.status())["activations"] and (await made.status())["models"][0]["held"] == 0:
                pass
        made.process.terminate()
        assert (await waiting)["count"] >= 1
        assert await asyncio.wait_for(made.process.wait(), 20) == 0


async def test_a_list_in_redis_scales_a_model_from_zero_and_lets_it_go(state: Path, tmp_path: Path) -> None:
    """No request comes through the gateway."""
    with redis_server(tmp_path) as redis:
        source = {"type": "redis", "url": redis.url, "list": "jobs", "interval_seconds": 0.2}
        async with system(state, {"max_replicas": 2, "concurrency": 2, "sources": [source]}) as made:
            await made.until(wanted=0, ready=0)
            redis.do("rpush", "jobs", "a", "b", "c")
            model = await made.until(ready=2)  # for two requests each
            assert (model["held"], model["in_flight"], model["sources"][0]["pending"]) == (0, 0, 3)
            assert f"redis: list jobs at {redis.url}" in await zerowake("status", "--state", str(state))
            redis.do("del", "jobs")
            await made.until(wanted=0, ready=0)
            redis.do("rpush", "jobs", "a")
            await made.until(ready=1)
            redis.process.kill()
            while (await made.until(ready=1))["sources"][0]["up"]:
                await asyncio.sleep(0.05)  # status has no stream
            async with made.session.get(f"{made.metrics}/metrics") as response:
                shown = await response.text()
            for number in ("up{LABELS} 0.0", "pending{LABELS} 1.0", "age_seconds{LABELS} ", "errors_total{LABELS} "):
                assert "zerowake_source_" + number.replace("LABELS", 'model="tiny",source="redis"') in shown


async def test_what_another_gateway_posts_scales_a_model_from_zero(state: Path) -> None:
    (state.parent / "push.token").write_text("hush")
    async with system(state, {"sources": [{"type": "push"}]}, push={"token_file": "push.token"}) as made:

        async def tell(pending: int) -> None:
            told, token = {"model": "tiny", "pending": pending}, {"Authorization": "Bearer hush"}
            async with made.session.post(f"{made.metrics}/demand", json=told, headers=token) as response:
                assert response.status == 204, await response.text()

        await tell(1)
        await made.until(ready=1)
        await tell(0)
        await made.until(wanted=0, ready=0)


async def test_the_openai_client_through_zero(state: Path) -> None:
    """The tiny engine is no language model: its 404 must come back as OpenAI's own error, from zero, unchanged."""
    async with system(state, {}) as made:
        client = AsyncOpenAI(base_url=f"{made.url}/v1", api_key="none", max_retries=0)
        assert [model.id async for model in client.models.list()] == ["tiny"]


async def test_status_without_a_system(tmp_path: Path) -> None:
    assert "is `zerowake up` running" in await zerowake("status", "--state", str(tmp_path), code=1)


async def test_a_standby_waits_for_the_first_request_and_an_idle_replica_becomes_one(state: Path) -> None:
    async with system(state, {"stage": "standby"}) as made:
        await made.until(rung="standby", ready=0)
        first = (await made.ask())["count"]
        (activation,) = (await made.status())["activations"]
        assert "image" in activation["phases"] and "staged" not in activation["phases"], "it was woken, and not restored"
        await made.until(rung="standby", ready=0, wanted=0)
        assert (await made.ask())["count"] == first + 1, "the process that answered before"


async def test_an_idle_replica_is_kept_for_a_while(state: Path) -> None:
    async with system(state, {"standby_seconds": 2}) as made:
        await made.until(rung="memory", ready=0)
        await made.ask()
        await made.until(rung="standby", ready=0)
        await made.until(rung="memory", ready=0)


async def test_a_model_waits_parked_and_an_idle_replica_is_parked_again(parkable: Path) -> None:
    async with system(parkable, {"stage": "parked"}) as made:
        await made.until(rung="parked", ready=0)
        first = (await made.ask())["count"]
        found = await made.status()
        (activation,) = found["activations"]
        assert activation["origin"] == "parked" and all(each["origin"] == "parked" for each in found["replicas"])  # or it idles again
        assert not {"cuda", "staged"} & activation["phases"].keys()
        await made.until(rung="parked", ready=0, wanted=0)
        assert (await made.ask())["count"] == first + 1, "the process that answered before"
        async with made.session.get(f"{made.metrics}/metrics") as response:
            assert 'zerowake_activation_seconds_count{model="tiny",origin="parked"} 2.0' in await response.text()


async def test_an_idle_replica_goes_down_from_parked_by_itself(parkable: Path) -> None:
    async with system(parkable, {"parked_seconds": 2, "standby_seconds": 2}) as made:
        await made.until(rung="memory", ready=0)
        await made.ask()
        for rung in ("parked", "standby", "memory"):
            await made.until(rung=rung, ready=0)
    async with system(parkable, {"parked_seconds": 2}) as made:
        await made.until(rung="memory", ready=0)
        await made.ask()
        for rung in ("parked", "memory"):
            await made.until(rung=rung, ready=0)


async def test_what_is_pinned_is_so_after_a_restart_and_until_the_file_says_otherwise(state: Path) -> None:
    async with system(state, {"pin": "memory"}) as made:
        await made.until(rung="memory", pinned="memory")
        killed = made.agent_pid()
        os.kill(killed, signal.SIGKILL)
        blocking_until(lambda: made.agent_pid() != killed, "another agent", not_yet=(StopIteration, OSError))
        await made.until(rung="memory", pinned="memory")
        async with asyncio.timeout(60):
            while "memory (pinned: memory)" not in " ".join((await zerowake("status", "--state", str(state))).split()):
                await asyncio.sleep(0.05)  # status has no stream, and may have had the last word of the one that was killed
    (pin,) = (state / "node/pins").iterdir()
    assert pin.read_text() == "memory\n"
    async with system(state, {"pin": "disk"}) as made:
        await made.until(pinned="disk")
    async with system(state, {"snapshot": "another", "command": ["true"], "port": PORT}):
        async with asyncio.timeout(20):
            while pin.exists():
                await asyncio.sleep(0.05)  # a folder has no stream
    async with system(state, {"pin": "disk"}) as made:
        await made.until(pinned="disk")
    async with system(state, {}) as made:
        await made.until(pinned="absent")
    assert not pin.exists()


async def test_what_cannot_be_parked_waits_as_a_standby_and_the_status_says_why(state: Path) -> None:
    async with system(state, {"stage": "parked"}) as made:
        await made.until(rung="standby", ready=0)
        await until_refused(made)
        assert "not parked" in await zerowake("status", "--state", str(state))
        await made.ask()
        await made.until(rung="standby", ready=0, wanted=0)


async def until_refused(made: System) -> None:
    async with asyncio.timeout(20):
        while "does not take part in the control directory" not in (await made.status())["models"][0]["refused"]:
            await asyncio.sleep(0.05)  # status has no stream
