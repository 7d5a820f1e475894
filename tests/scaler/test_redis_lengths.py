"""Lengths of lists and streams in a real Redis: silent, slow, wrong, killed and back."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from scaler.sources.redis_declaration import RedisDeclaration
from scaler.sources.source import SourceError
from tests.worlds.asked_elsewhere import OFTEN, asked_elsewhere, silent_and_back
from tests.worlds.redis_server import RedisServer, redis_server
from tests.worlds.s3_server import Wire


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


def declared(server: RedisServer, **key: Any) -> RedisDeclaration:
    return RedisDeclaration(**{"type": "redis", "url": server.url, "interval_seconds": OFTEN} | key)


async def test_a_list(redis: RedisServer) -> None:
    async with asked_elsewhere(declared(redis, list="jobs")) as asked:
        await asked.says(0)  # there is no such key, which is what an empty list is
        redis.do("rpush", "jobs", "a", "b", "c")
        await asked.says(3)
        redis.do("del", "jobs")
        await asked.says(0)


async def test_a_stream(redis: RedisServer) -> None:
    async with asked_elsewhere(declared(redis, stream="jobs")) as asked:
        await asked.says(0)
        redis.do("xadd", "jobs", "*", "k", "v")
        redis.do("xadd", "jobs", "*", "k", "v")
        await asked.says(2)


async def test_what_a_group_has_left_of_a_stream(redis: RedisServer) -> None:
    redis.do("xgroup", "create", "jobs", "workers", "$", "mkstream")
    async with asked_elsewhere(declared(redis, stream="jobs", group="workers"), hold_seconds=0.5) as asked:
        await asked.says(0)
        names = [redis.do("xadd", "jobs", "*", "k", "v") for _ in range(3)]
        await asked.says(3)
        redis.do("xreadgroup", "group", "workers", "w1", "count", "1", "streams", "jobs", ">")
        redis.do("xack", "jobs", "workers", names[0])
        await asked.says(2)
        redis.do("xreadgroup", "group", "workers", "w1", "count", "1", "streams", "jobs", ">")
        redis.do("xack", "jobs", "workers", names[1])
        await asked.says(1)
        redis.do("xadd", "jobs", "*", "k", "v")
        redis.do("xdel", "jobs", names[2])  # before it was read: how many are left is not known to Redis any more
        await asked.falls_silent("Redis does not say how much of stream jobs group workers has left")
        redis.do("xgroup", "destroy", "jobs", "workers")
        await asked.fails("stream jobs has no group workers")


async def test_silent_and_back(redis: RedisServer) -> None:
    redis.do("rpush", "jobs", "a", "b")
    await silent_and_back(declared(redis, list="jobs"), redis.process.pid, pending=2)


async def test_a_host_is_where_its_lookup_says(redis: RedisServer) -> None:
    """At each connection: an address may be another's by the next one."""
    found: list[str] = []

    async def lookup(host: str) -> Sequence[str]:
        if not found:
            raise SourceError(f"there is no {host}")
        return found

    redis.do("rpush", "jobs", "a", "b")
    url = f"redis://queue.tenant.svc:{redis.port}/0"
    async with asked_elsewhere(declared(redis, list="jobs", url=url), lookup=lookup) as asked:
        await asked.fails("there is no queue.tenant.svc")
        found.append("127.0.0.1")
        await asked.says(2)
        found.clear()
        redis.do("client", "kill", "type", "normal")
        await asked.fails("there is no queue.tenant.svc")
        assert asked.told.pending == 2, "the last value holds"


async def test_slow_is_not_silent(redis: RedisServer) -> None:
    wire = Wire(redis.port)
    wire.rate = 40  # bytes a second: an answer takes a tenth of one, and a new connection several
    async with wire.laid(), asked_elsewhere(declared(redis, list="jobs", url=f"redis://127.0.0.1:{wire.port}/0")) as asked:
        await asked.says(0)
        redis.do("rpush", "jobs", *"abcdefghij")
        await asked.says(10)
        assert asked.state.age_seconds is not None


async def test_killed_and_back(tmp_path: Path) -> None:
    with redis_server(tmp_path) as first:
        first.do("rpush", "jobs", "a")
        port = first.port
        async with asked_elsewhere(declared(first, list="jobs")) as asked:
            await asked.says(1)
            first.process.kill()
            await asked.fails("Connect")
            assert asked.told.pending == 1, "the last value holds"
            first.process.wait()
            with redis_server(tmp_path, port=port) as second:
                second.do("rpush", "jobs", "a", "b")
                await asked.says(2)


async def test_a_key_of_another_kind(redis: RedisServer) -> None:
    redis.do("set", "jobs", "7")
    async with asked_elsewhere(declared(redis, list="jobs")) as asked:
        await asked.falls_silent("WRONGTYPE")
        redis.do("del", "jobs")
        await asked.says(0)


@contextlib.asynccontextmanager
async def liar(answer: bytes) -> AsyncIterator[str]:
    """A server that answers each command so; the URL."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while asked := await reader.read(1 << 16):
            writer.write(answer * asked.count(b"*"))  # which begins a command
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("answer", "why"), [(b":-5\r\n", "-5"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", "Protocol Error"), (b"+many\r\n", "'many' is no length")]
)
async def test_lies(answer: bytes, why: str) -> None:
    async with liar(answer) as url, asked_elsewhere(RedisDeclaration(type="redis", url=url, list="jobs"), read_seconds=1) as asked:
        await asked.fails(why)
        await asked.falls_silent(why)


async def test_a_password_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    with redis_server(tmp_path, password="first") as redis:
        redis.do("rpush", "jobs", "a")
        async with asked_elsewhere(declared(redis, list="jobs", password_file=file)) as asked:
            await asked.falls_silent(f"{file}: No such file")
            file.write_text("wrong\n")
            await asked.fails("invalid username-password pair")
            file.write_text("first\n")
            await asked.says(1)
            redis.do("config", "set", "requirepass", "second")
            redis.password = "second"
            redis.do("client", "kill", "type", "normal")
            await asked.fails("invalid username-password pair")
            file.write_text("second\n")
            await asked.says(1)


async def test_a_user_and_a_password_from_a_variable(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    redis.do("acl", "setuser", "scaler", "on", ">hush", "~jobs", "+llen", "+ping")
    monkeypatch.setenv("REDIS_PASSWORD", "hush")
    url = f"redis://scaler@127.0.0.1:{redis.port}"
    async with asked_elsewhere(declared(redis, list="jobs", url=url, password_env="REDIS_PASSWORD")) as asked:
        await asked.says(0)
    async with asked_elsewhere(declared(redis, list="others", url=url, password_env="REDIS_PASSWORD")) as asked:
        await asked.falls_silent("no permissions to access")
