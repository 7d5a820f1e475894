"""What alerts are for, made to happen to real programs: the scaler, its agent and gpumem, read by a real Prometheus with the real rules.

Numbers alone make each alert fire and stop in test_alerts.py; here it is the fault itself.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import shutil
import signal
import ssl
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumem.client import Client
from gpumem.client.control import Control
from restore_agent.snapshots.catalog import Catalog
from tests.worlds.alerting import alerting
from tests.worlds.certificates import Authority
from tests.worlds.command import zerowake
from tests.worlds.gpumem_server import MIB, make_weights, served
from tests.worlds.machine import machine
from tests.worlds.ports import free_port
from tests.worlds.redis_server import redis_server

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for CRIU and namespaces")
_ENGINE, _PORT = Path(__file__).parent / "worlds/hashing_engine.py", 8000


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    mapped = tmp_path_factory.mktemp("mapped") / "weights.bin"
    mapped.write_bytes(os.urandom(1 << 20))
    return [sys.executable, str(_ENGINE), str(_PORT), "4", str(mapped)]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, command: list[str]) -> Path:
    """A state folder with the snapshot `tiny`."""
    state = tmp_path_factory.mktemp("captured") / "state"
    asyncio.run(zerowake("snapshot", "create", "tiny", "--state", str(state), "--port", str(_PORT), "--canary", "/sum", "--", *command))
    return state


@pytest.fixture
def state(captured: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(captured, tmp_path / "state", symlinks=True, ignore=shutil.ignore_patterns("*.sock", "memory")))


async def test_a_snapshot_is_damaged_and_its_model_starts_cold(state: Path, command: list[str], tmp_path: Path) -> None:
    catalog = Catalog(state)
    snapshot = catalog.get("default", "tiny")
    chunk = catalog.chunks.path(snapshot.chunks[0].hash)
    whole = chunk.read_bytes()
    tiny = {"snapshot": "tiny", "stage": "disk", "command": command, "port": _PORT, "cooldown_seconds": 0.5, "polling_seconds": 0.2}
    async with machine(state, {"tiny": tiny}) as made, alerting(tmp_path / "prometheus", *made.pages) as alerts:
        await made.until("agent", 'zerowake_node_snapshots{state="whole"}', lambda value: value == 1)
        assert await made.ask("tiny", "/sum") == 200
        await made.until("agent", 'zerowake_restore_rungs_total{model="tiny",rung="disk"}', lambda value: value == 1)
        chunk.write_bytes(bytes(len(whole)))
        await alerts.fires("ZerowakeSnapshotUnusable", state="corrupt")
        await made.until("scaler", 'zerowake_replicas{model="tiny"}', lambda value: value == 0)
        assert await made.ask("tiny", "/sum") == 200
        await alerts.fires("ZerowakeColdFallbacks", model="tiny")
        assert await made.value("agent", 'zerowake_restores_total{model="tiny",origin="cold"}') == 1
        chunk.write_bytes(whole)
        await alerts.is_quiet("ZerowakeSnapshotUnusable")


async def test_nobody_has_signed_a_snapshot_until_its_signature_is_back(state: Path, tmp_path: Path) -> None:
    signature = Catalog(state).get("default", "tiny").directory / "signature.json"
    async with machine(state, {"tiny": {"snapshot": "tiny"}}) as made, alerting(tmp_path / "prometheus", *made.pages) as alerts:
        await made.until("agent", 'zerowake_node_snapshots{state="whole"}', lambda value: value == 1)
        signature.rename(tmp_path / "signature.json")
        await alerts.fires("ZerowakeSnapshotUnusable", state="untrusted")
        (tmp_path / "signature.json").rename(signature)
        await alerts.is_quiet("ZerowakeSnapshotUnusable")


async def test_what_a_disk_has_lost_by_itself_does_not_come_into_memory(state: Path, tmp_path: Path) -> None:
    """Before the agent began to look: that it is other bytes is seen as all of them are read."""
    catalog = Catalog(state)
    chunk = catalog.chunks.path(catalog.get("default", "tiny").chunks[0].hash)
    lost = bytearray(chunk.read_bytes())
    lost[len(lost) // 2] ^= 1
    chunk.write_bytes(lost)
    tiny = {"snapshot": "tiny", "stage": "memory"}
    async with machine(state, {"tiny": tiny}) as made, alerting(tmp_path / "prometheus", *made.pages) as alerts:
        await alerts.fires("ZerowakeStagingFailing", rung="memory")
        await alerts.fires("ZerowakeSnapshotUnusable", state="corrupt")


async def test_a_source_of_demand_ends_and_is_back(tmp_path: Path) -> None:
    jobs = {"type": "redis", "list": "jobs", "interval_seconds": 0.2}
    with redis_server(tmp_path) as redis:
        never = {"command": ["sleep", "3600"], "port": _PORT, "sources": [jobs | {"url": redis.url}]}
        async with machine(tmp_path / "state", {"never": never}) as made, alerting(tmp_path / "prometheus", *made.pages) as alerts:
            await made.until("scaler", 'zerowake_source_up{model="never",source="redis"}', lambda value: value == 1)
            redis.process.kill()
            await alerts.fires("ZerowakeSourceSilent", model="never", source="redis")
            redis.process.wait()
            with redis_server(tmp_path, port=redis.port):
                await alerts.is_quiet("ZerowakeSourceSilent")


async def test_a_capture_fails(state: Path, tmp_path: Path) -> None:
    async with machine(state, {"tiny": {"snapshot": "tiny"}}) as made, alerting(tmp_path / "prometheus", *made.pages) as alerts:
        await zerowake("snapshot", "create", "broken", "--state", str(state), "--port", str(_PORT), "--", "/bin/false", code=1)
        await alerts.fires("ZerowakeCaptureFailing", model="broken")


async def test_an_agent_stands_still_and_goes_on(state: Path, tmp_path: Path) -> None:
    async with machine(state, {"tiny": {"snapshot": "tiny"}}) as made, alerting(tmp_path / "prometheus", *made.pages) as alerts:
        pid = made.agent_pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            await alerts.fires("ZerowakeAgentGone")
        finally:
            os.kill(pid, signal.SIGCONT)
        await alerts.is_quiet("ZerowakeAgentGone")


async def test_more_requests_come_than_may_wait(tmp_path: Path) -> None:
    """The engine takes longer than the test."""
    slow = {"command": ["sleep", "3600"], "port": _PORT, "max_requests": 1, "max_wait_seconds": 15}
    async with machine(tmp_path / "state", {"slow": slow}) as made, alerting(tmp_path / "prometheus", *made.pages) as alerts:
        statuses = await asyncio.gather(*(made.ask("slow", "/sum") for _ in range(4)))
        assert sorted(statuses) == [429, 429, 429, 503]
        await alerts.fires("ZerowakeQueueRefusing", model="slow", reason="too_many_requests")
        await alerts.fires("ZerowakeQueueRefusing", model="slow", reason="no_replica")


async def test_a_certificate_is_about_to_end_until_it_is_renewed(tmp_path: Path) -> None:
    day, month = (Authority("zerowake test authority", datetime.timedelta(days=days)) for days in (1, 30))
    certificate, key = day.issue("scaler").write(tmp_path, "tls")
    port = free_port()
    keda = {"listen": f"127.0.0.1:{port}", "tls": {"certificate": str(certificate), "key": str(key)}}
    never = {"command": ["sleep", "3600"], "port": _PORT}
    async with machine(tmp_path / "state", {"never": never}, keda=keda) as made, alerting(tmp_path / "prometheus", *made.pages) as alerts:
        await alerts.fires("ZerowakeCertificateEnds", file=str(certificate))
        month.issue("scaler").write(tmp_path, "tls")
        context = ssl.create_default_context(cadata=month.certificate.decode())
        context.set_alpn_protocols(["h2"])
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
        writer.close()
        await alerts.is_quiet("ZerowakeCertificateEnds")


async def test_scale_ups_take_longer_than_they_may(tmp_path: Path) -> None:
    """An engine that is not there for six seconds, which nobody has a snapshot of. Of the first one alone no rate can be told."""
    server = f"import http.server as h, time; time.sleep(6); h.HTTPServer(('', {_PORT}), h.SimpleHTTPRequestHandler).serve_forever()"
    late = {"command": [sys.executable, "-c", server], "port": _PORT, "health": "/", "cooldown_seconds": 0.5, "polling_seconds": 0.2}
    async with machine(tmp_path / "state", {"late": late}) as made, alerting(tmp_path / "prometheus", *made.pages) as alerts:
        for count in (1, 2):
            assert await made.ask("late", "/") == 200
            await made.until(
                "scaler", 'zerowake_activations_total{model="late",outcome="served"}', lambda value, count=count: value == count
            )
            await made.until("scaler", 'zerowake_replicas{model="late"}', lambda value: value == 0)
        await alerts.fires("ZerowakeActivationsLate", model="late")
        await alerts.fires("ZerowakeActivationsOftenLate", model="late")


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For a socket, whose path has 107 bytes at most."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


async def test_gpumem_is_full_gives_nothing_back_and_dies(short_folder: Path, tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "weights.bin", 31 * MIB)
    never = {"command": ["sleep", "3600"], "port": _PORT}
    with served(short_folder, reserve=64 * MIB, arena=32 * MIB) as server:
        environment = {**os.environ, "GPUMEM_SOCKET": str(server.socket)}
        async with (
            machine(tmp_path / "state", {"never": never}, environment) as made,
            alerting(tmp_path / "prometheus", *made.pages) as alerts,
        ):
            await made.until("agent", 'zerowake_gpumem_held_bytes{gpu="host",use="free"}', lambda value: value == 64 * MIB)
            engine = Client(server.socket)
            await asyncio.to_thread(engine.scratch, 62 * MIB)
            await alerts.fires("ZerowakePoolNearlyFull", gpu="host")
            async with Control.connected(server.socket, "test") as control:
                await control.reserve("host", 0)
                await alerts.fires("ZerowakeGpuMemoryNotGivenBack", gpu="host")
                engine.close()
                await alerts.is_quiet("ZerowakeGpuMemoryNotGivenBack")
                await control.reserve("host", 64 * MIB)
                await alerts.is_quiet("ZerowakePoolNearlyFull")
                await control.fill(weights.layout, weights.sources, "", pinned=True)
                await alerts.fires("ZerowakeArenaNearlyFull")
                await control.evict(weights.ref(""))
                await alerts.is_quiet("ZerowakeArenaNearlyFull")
            assert "ZerowakeGpumemSilent" not in await alerts.firing()
            server.process.kill()
            await alerts.fires("ZerowakeGpumemSilent")


async def test_others_have_the_memory_that_gpumem_gave_back(short_folder: Path, tmp_path: Path) -> None:
    """As programs in containers see it, by a file of their own in place of /proc/meminfo: the machine itself is not filled."""
    meminfo = tmp_path / "meminfo"

    meminfo.touch()

    def leave(size: int) -> None:
        with meminfo.open("r+") as file:  # in place, by one write of one length: it is read at any moment
            file.write(f"MemTotal: {1 << 20} kB\nMemAvailable: {size >> 10:>12} kB\n")

    leave(512 * MIB)
    there = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /proc/meminfo && exec "$@"', str(meminfo))
    never = {"command": ["sleep", "3600"], "port": _PORT}
    with served(short_folder, reserve=64 * MIB, behind=there) as server:
        environment = {**os.environ, "GPUMEM_SOCKET": str(server.socket)}
        async with (
            machine(tmp_path / "state", {"never": never}, environment) as made,
            alerting(tmp_path / "prometheus", *made.pages) as alerts,
        ):
            engine = Client(server.socket)
            await asyncio.to_thread(engine.scratch, 32 * MIB)
            leave(0)
            engine.close()
            await alerts.fires("ZerowakeGpuMemoryOwed", gpu="host")
            leave(512 * MIB)
            await alerts.is_quiet("ZerowakeGpuMemoryOwed")
