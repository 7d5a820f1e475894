"""Sets of addresses that change: who hears of it, and names that are looked up again."""

import asyncio
import socket

import pytest

from scaler.fleet.addresses import Addresses, looked_up


def test_listeners_hear_of_changes_only_and_until_their_block_ends() -> None:
    addresses, seen = Addresses(), list[frozenset[str]]()
    addresses.set(["a:1"])
    with addresses.told_to(seen.append):
        addresses.set(["a:1"])
        addresses.set(["b:1", "a:1"])
    addresses.set([])
    assert seen == [{"a:1"}, {"a:1", "b:1"}]


async def test_names_are_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name stands for all its addresses; a lookup that fails takes nothing away, a name that is gone does."""
    monkeypatch.setattr("scaler.fleet.addresses._LOOKUP_SECONDS", 0.01)
    answers: dict[str, object] = {"one": ["10.0.0.1", "10.0.0.2"]}

    async def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        answer = answers["one"]
        if isinstance(answer, OSError):
            raise answer
        return [(2, 1, 6, "", (address, port)) for address in answer]  # type: ignore[attr-defined]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    seen: asyncio.Queue[frozenset[str]] = asyncio.Queue()
    async with looked_up(["one:9445", "unix:/run/x"]) as addresses, asyncio.timeout(5):
        with addresses.told_to(seen.put_nowait):
            assert await seen.get() == {"10.0.0.1:9445", "10.0.0.2:9445", "unix:/run/x"}
            answers["one"] = socket.gaierror(socket.EAI_AGAIN, "try again")
            await asyncio.sleep(0.05)
            answers["one"] = ["10.0.0.3"]
            assert await seen.get() == {"10.0.0.3:9445", "unix:/run/x"}
            answers["one"] = socket.gaierror(socket.EAI_NONAME, "gone")
            assert await seen.get() == {"unix:/run/x"}
