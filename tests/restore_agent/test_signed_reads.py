"""What obstore signs and a connection of ours carries: below a prefix, with a session's token or none, and what is left to obstore."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator

import pytest

from restore_agent.transfer import bucket as buckets
from restore_agent.transfer.bucket import Bucket
from restore_agent.transfer.signed_reads import SignedReads
from restore_agent.transfer.source import Absent, Denied, Piece, Unreachable
from tests.worlds.s3_server import S3Server, Wire
from tests.worlds.virtual_time import StandingClock

DATA = random.Random(6).randbytes((1 << 20) + 3)


async def _read(source: Bucket | SignedReads, key: str, offset: int = 0, length: int = len(DATA)) -> bytes:
    return b"".join([bytes(piece) async for piece in source.read(key, offset, length)])


@pytest.fixture
async def store(bucket: str) -> AsyncIterator[Bucket]:
    """With an object below a prefix, of a name that has to be escaped in a URL."""
    made = Bucket(bucket, "fleet/one", StandingClock())
    await made.put("a b+c/d%2Fe", DATA)
    yield made
    await made.close()


async def test_a_bucket_is_read_without_obstore(store: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets.obstore, "get_async", None)
    assert await _read(store, "a b+c/d%2Fe") == DATA
    assert await _read(store, "a b+c/d%2Fe", 1000, 500) == DATA[1000:1500]
    assert await _read(store, "a b+c/d%2Fe", len(DATA) - 5, 500) == DATA[-5:]


async def test_what_is_not_there_is_no_failure_of_it(store: Bucket) -> None:
    with pytest.raises(Absent):
        await _read(store._signed, "nothing")
    assert store._signed.are_tried


async def test_what_a_server_refuses_obstore_asks_in_its_own_way(bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    clock = StandingClock()
    refused = Bucket(bucket, "", clock)
    with pytest.raises(Denied, match=r"SignatureDoesNotMatch.*set AWS_SECRET_ACCESS_KEY"):
        await _read(refused, "anything")
    assert not refused._signed.are_tried, "the next is asked of obstore alone"
    clock.moment += 61
    assert refused._signed.are_tried
    await refused.close()


async def test_one_that_is_cut_goes_on_where_it_stood(store: Bucket, bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    by_obstore = Bucket._read_by_obstore

    async def noted(self: Bucket, key: str, offset: int, length: int) -> AsyncIterator[Piece]:
        asked.append(length)
        async with contextlib.aclosing(by_obstore(self, key, offset, length)) as pieces:
            async for piece in pieces:
                yield piece

    monkeypatch.setattr(Bucket, "_read_by_obstore", noted)
    async with Wire(s3.port).laid() as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", wire.endpoint)
        wire.cut_after = 700_000
        far = Bucket(bucket, "fleet/one")
        assert await _read(far, "a b+c/d%2Fe") == DATA
        await far.close()
    assert len(asked) == 1 and 0 < asked[0] < len(DATA)


async def test_a_proxy_is_for_obstore_to_speak_to(store: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with pytest.raises(Unreachable, match="is behind a proxy"):
        await _read(store._signed, "a b+c/d%2Fe")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert await _read(store._signed, "a b+c/d%2Fe") == DATA
