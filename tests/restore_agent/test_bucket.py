"""A bucket on a real S3 server: objects, ranges, and each way in which a server or a connection fails, in its own word."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from restore_agent.transfer.bucket import Bucket
from restore_agent.transfer.fetch import Fetch, Patience
from restore_agent.transfer.layout import chunk_key
from restore_agent.transfer.source import Absent, Altered, Denied, Full, TransferError, Unreachable, read_whole
from tests.worlds.faulty_source import chunk_of
from tests.worlds.s3_server import KEY, SECRET, S3Server, Wire, s3_server, small_disk
from tests.worlds.wrong_clock import WrongClock

DATA = random.Random(3).randbytes((1 << 20) + 7)
CHUNK = chunk_of(DATA)
OBJECT = f"chunks/{CHUNK.hash[:2]}/{CHUNK.hash}"


async def _read(store: Bucket, key: str, offset: int, length: int) -> bytes:
    return b"".join([bytes(piece) async for piece in store.read(key, offset, length)])


async def _bring(*stores: Bucket) -> bytes:
    target = bytearray(CHUNK.size)
    await Fetch(lambda chunk: stores).bring(CHUNK, memoryview(target))
    return bytes(target)


@pytest.mark.parametrize(("offset", "length"), [(0, len(DATA)), (1, 5000), (300_000, 1 << 30), (len(DATA), 5), (0, 0)])
async def test_a_range_is_read_as_far_as_the_object_goes(bucket: str, offset: int, length: int) -> None:
    store = Bucket(bucket, "fleet/one")
    await store.put(OBJECT, DATA)
    assert await _read(store, OBJECT, offset, length) == DATA[offset : offset + length]
    assert await store.size(OBJECT) == len(DATA)


async def test_an_object_lies_below_the_prefix_and_a_list_has_it(bucket: str, s3: S3Server) -> None:
    store = Bucket(bucket, "fleet/one")
    await store.put(OBJECT, b"old")
    await store.put(OBJECT, memoryview(DATA))
    await store.put("names/a/b.json", b"{}")
    assert (s3.root / bucket / "fleet/one" / OBJECT).read_bytes() == DATA
    assert {(found.key, found.size) async for found in store.objects("chunks")} == {(OBJECT, len(DATA))}
    assert len([found async for found in store.objects("")]) == 2
    assert str(store) == f"s3://{bucket}/fleet/one"
    await store.remove(OBJECT)
    await store.remove(OBJECT)
    assert [found async for found in store.objects("chunks")] == []


async def test_an_object_in_parts_is_whole(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restore_agent.transfer.bucket._PARTS_FROM", 6 << 20)
    monkeypatch.setattr("restore_agent.transfer.bucket._PART", 5 << 20)
    large = random.Random(4).randbytes((12 << 20) + 1)
    store = Bucket(bucket)
    await store.put("large", large)
    assert await _read(store, "large", 0, len(large)) == large


async def _absent(store: Bucket) -> None:
    with pytest.raises(Absent, match=f"s3://.* has no {OBJECT}"):
        await store.size(OBJECT)
    with pytest.raises(Absent):
        await read_whole(store, OBJECT, 9)


async def test_what_is_not_there_is_absent(bucket: str) -> None:
    await _absent(Bucket(bucket))


async def _refused(store: Bucket, word: type[TransferError], said: str) -> None:
    """Whatever is asked of it."""
    with pytest.raises(word, match=said):
        await store.size(OBJECT)
    with pytest.raises(word, match=said):
        await read_whole(store, OBJECT, 9)
    with pytest.raises(word, match=said):
        await store.put("other", b"1")
    with pytest.raises(word, match=said):
        _ = [found async for found in store.objects("")]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "SignatureDoesNotMatch.*set AWS_SECRET_ACCESS_KEY"),
        ("AWS_ACCESS_KEY_ID", "nobody", "knows no such access key"),
        ("AWS_SESSION_TOKEN", "of-yesterday", "InvalidToken.*renew the credentials"),
    ],
)
async def test_wrong_credentials_are_denied_and_never_absent(
    bucket: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    await _refused(Bucket(bucket), Denied, said)


async def test_somebody_without_a_right_to_the_bucket_is_denied(bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.add_user(f"guest-{bucket}", "guest-secret")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"guest-{bucket}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guest-secret")
    await _refused(Bucket(bucket), Denied, "AccessDenied.*no right to this")


async def test_no_credentials_at_all_are_denied(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://169.254.170.23:1/nobody")
    monkeypatch.setattr("restore_agent.transfer.bucket._RETRIES", {"max_retries": 0})
    monkeypatch.setattr("restore_agent.transfer.bucket._CONNECT", "200ms")
    with pytest.raises(Denied, match="no credentials were found: set AWS_ACCESS_KEY_ID"):
        await Bucket(bucket).size(OBJECT)


async def test_a_bucket_that_does_not_exist_is_no_empty_one(s3: S3Server) -> None:
    await _refused(Bucket("no-such-bucket"), Unreachable, "there is no such bucket")


async def test_a_server_that_does_not_run_is_unreachable(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("restore_agent.transfer.bucket._RETRIES", {"max_retries": 0})
    await _refused(Bucket(bucket), Unreachable, "cannot be reached: .*check the endpoint")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a file system that is small")
async def test_a_bucket_that_is_full_says_so(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", 2 << 20) as folder, s3_server(folder) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        store = Bucket(server.make_bucket("full"))
        await store.put("first", DATA)
        with pytest.raises(Full, match=r"is full.*make room there"):
            await store.put("second", DATA)
        await _absent(store)


async def test_a_clock_that_is_wrong_is_said(bucket: str, tmp_path: Path) -> None:
    clock = WrongClock(tmp_path)
    clock.jump(24 * 60 * 60)
    asks = "import asyncio, sys; from restore_agent.transfer.bucket import Bucket; asyncio.run(Bucket(sys.argv[1]).size('a'))"
    done = subprocess.run(
        [sys.executable, "-c", asks, bucket], env={**os.environ, **clock.env}, capture_output=True, text=True, check=False
    )
    assert done.returncode and "Denied: " in done.stderr
    assert "this machine's clock differs too much from the server's" in done.stderr


async def test_a_bit_that_flipped_on_its_disk_is_found_and_the_next_source_has_it(bucket: str, s3: S3Server) -> None:
    rotten, sound = Bucket(bucket, "rotten"), Bucket(bucket, "sound")
    await rotten.put(OBJECT, DATA)
    await sound.put(OBJECT, DATA)
    path = s3.root / bucket / "rotten" / OBJECT
    path.write_bytes(DATA[:700_000] + bytes([DATA[700_000] ^ 1]) + DATA[700_001:])
    assert await _bring(rotten, sound) == DATA
    with pytest.raises(Altered, match=rf"s3://{bucket}/rotten has other bytes under the name of {CHUNK.hash}"):
        await _bring(rotten)


async def test_an_object_that_was_truncated_is_found_and_the_next_source_has_it(bucket: str, s3: S3Server) -> None:
    torn, sound = Bucket(bucket, "torn"), Bucket(bucket, "sound")
    await torn.put(OBJECT, DATA)
    await sound.put(OBJECT, DATA)
    (s3.root / bucket / "torn" / OBJECT).write_bytes(DATA[:500_000])
    assert await _bring(torn, sound) == DATA
    with pytest.raises(Altered, match=r"has 500000 of its 1048583 bytes"):
        await _bring(torn)


@contextlib.asynccontextmanager
async def _wired(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Wire]:
    async with Wire(s3.port).laid() as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", wire.endpoint)
        yield wire


async def test_a_connection_that_is_cut_again_and_again_costs_no_byte(bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    await Bucket(bucket).put(OBJECT, DATA)
    async with _wired(s3, monkeypatch) as wire:
        wire.cut_after = 600_000
        assert await _bring(Bucket(bucket)) == DATA
        assert wire.connections > 1


async def test_a_bucket_behind_a_slow_line_is_left_for_another(bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    near = Bucket(bucket)
    await near.put(OBJECT, DATA)
    async with _wired(s3, monkeypatch) as wire:
        wire.rate = 1000
        far = Bucket(bucket)
        target = bytearray(CHUNK.size)
        await Fetch(lambda chunk: [far, near], patience=Patience(stall=2.0)).bring(CHUNK, memoryview(target))
        assert bytes(target) == DATA
        assert wire.connections == 1


async def test_chunks_share_connections(bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [DATA[at : at + 100_000] for at in range(0, 1_000_000, 100_000)]
    async with _wired(s3, monkeypatch) as wire:
        store = Bucket(bucket)
        for piece in pieces:
            await store.put(chunk_key(chunk_of(piece).hash), piece)
        before = wire.connections
        await Fetch(lambda chunk: [store], streams=2).bring_all(map(chunk_of, pieces), lambda chunk, data: None)
        assert wire.connections <= before + 2


async def test_a_connection_that_carries_nothing_is_unreachable(bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    await Bucket(bucket, "sound").put(OBJECT, DATA)
    sound = Bucket(bucket, "sound")
    monkeypatch.setattr("restore_agent.transfer.bucket._RETRIES", {"max_retries": 0})
    async with _wired(s3, monkeypatch) as wire:
        wire.cut_after = 0
        with pytest.raises(Unreachable):
            await Bucket(bucket, "sound").size(OBJECT)
        assert await _bring(Bucket(bucket, "sound"), sound) == DATA


async def test_a_key_from_a_file_is_read_again_when_it_changes(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "credentials"
    file.write_text(f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    await Bucket(bucket).put(OBJECT, DATA)
    file.write_text(f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = wrong\n")
    with pytest.raises(Denied):
        await Bucket(bucket).size(OBJECT)


async def test_a_role_is_asked_where_the_environment_names_its_endpoint(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def role(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "of the pod"
        given = {"AccessKeyId": KEY, "SecretAccessKey": SECRET, "Token": "", "Expiration": "2100-01-01T00:00:00Z"}
        return web.Response(text=json.dumps(given), content_type="application/json")

    app = web.Application()
    app.add_routes([web.get("/role", role)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "token").write_text("of the pod")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{runner.addresses[0][1]}/role")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
    try:
        await _absent(Bucket(bucket))
    finally:
        await runner.cleanup()
