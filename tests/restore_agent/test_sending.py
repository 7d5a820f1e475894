"""Objects put into a store: only what is missing, each again while the store is away, and a name that does not count gives way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from restore_agent.snapshots.chunks import Chunk
from restore_agent.snapshots.store import Store
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.layout import chunk_key, name_key
from restore_agent.transfer.progress import Progress
from restore_agent.transfer.sending import Sending
from restore_agent.transfer.source import Piece, Unreachable
from tests.worlds.travelling import node

DATA = {Chunk(blake3(data).hexdigest(), len(data)): data for data in (b"a" * 1000, b"b" * 2000)}


class _Failing(Directory):
    """It is away for the next so many puts."""

    away = 0

    async def put(self, key: str, data: Piece) -> None:
        if self.away:
            self.away -= 1
            raise Unreachable("it restarts")
        await super().put(key, data)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with node(tmp_path / "state") as store:
        yield store


@pytest.fixture
async def remote(tmp_path: Path) -> AsyncIterator[_Failing]:
    (tmp_path / "remote").mkdir()
    remote = _Failing(tmp_path / "remote")
    yield remote
    await remote.close()


async def _read(chunk: Chunk, target: memoryview) -> None:
    target[:] = DATA[chunk]


async def test_what_the_store_has_is_not_sent_and_what_it_has_torn_is(remote: _Failing) -> None:
    first, second = DATA
    told: list[Progress] = []
    await remote.put(chunk_key(first.hash), DATA[first])
    await remote.put(chunk_key(second.hash), DATA[second][:-1])
    sending = Sending(remote, told.append)
    sending.expect(DATA)
    await sending.chunks(DATA, _read)
    assert told[0] == Progress(0, 0, 3000) and told[-1] == Progress(3000, 2000, 3000)
    assert await remote.size(chunk_key(second.hash)) == 2000


async def test_a_store_that_is_away_for_a_moment_is_asked_again(remote: _Failing) -> None:
    remote.away = 2
    await Sending(remote).chunks(DATA, _read)
    assert [await remote.size(chunk_key(chunk.hash)) for chunk in DATA] == [1000, 2000]
    remote.away = 1000
    with pytest.raises(Unreachable):
        await Sending(remote).name("default", "small", b"{}")


async def test_a_name_that_does_not_count_is_none_and_says_its_number(remote: _Failing, store: Store) -> None:
    assert await Sending(remote).named(store.keyring, "default", "small") == (None, 0)
    await remote.put(name_key("default", "small"), b'{"record": {"sequence": 7}}')
    assert await Sending(remote).named(store.keyring, "default", "small") == (None, 7)
    for claim in (b"{torn", b'{"record": {"sequence": -1}}', b'{"record": {"sequence": 99999999999999999999}}'):
        await remote.put(name_key("default", "small"), claim)
        assert await Sending(remote).named(store.keyring, "default", "small") == (None, 0)
