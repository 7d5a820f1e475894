"""A store as it says that it is: made encrypted where there is a key, and never a byte in clear where one is meant to be encrypted."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.snapshots.encryption_keys import EncryptionKeys
from restore_agent.transfer.bucket import Bucket
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.fetch import Fetch
from restore_agent.transfer.layout import chunk_key, manifest_key, name_key
from restore_agent.transfer.opened_store import OpenedStore
from restore_agent.transfer.source import Absent, Altered, Denied, TransferError, Unreachable, read_whole
from tests.worlds.encrypted import PAGES, RANDOM
from tests.worlds.faulty_source import chunk_of
from tests.worlds.s3_server import S3Server

MANIFEST = manifest_key("ab" * 32)
CHUNK = chunk_of(RANDOM)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


@pytest.fixture
def keys(tmp_path: Path) -> EncryptionKeys:
    keys = EncryptionKeys(tmp_path / "keys")
    keys.make()
    return keys


@pytest.fixture
def none(tmp_path: Path) -> EncryptionKeys:
    return EncryptionKeys(tmp_path / "no-keys")


@contextlib.asynccontextmanager
async def opened(inner: Directory | Bucket | Path, keys: EncryptionKeys, *, writes: bool = False) -> AsyncIterator[OpenedStore]:
    store = OpenedStore(Directory(inner) if isinstance(inner, Path) else inner, keys, writes=writes)
    try:
        yield store
    finally:
        await store.close()


async def put(folder: Path, keys: EncryptionKeys, data: bytes = RANDOM) -> None:
    async with opened(folder, keys, writes=True) as store:
        await store.put(chunk_key(chunk_of(data).hash), data)
        await store.put(MANIFEST, b'{"env": "hunter2"}')


async def got(folder: Path, keys: EncryptionKeys, data: bytes = RANDOM) -> None:
    async with opened(folder, keys) as store:
        assert await read_whole(store, MANIFEST, 100) == b'{"env": "hunter2"}'
        target = bytearray(len(data))
        await Fetch(lambda chunk: [store]).bring(chunk_of(data), memoryview(target))
        assert target == data


def said(folder: Path) -> object:
    return json.loads((folder / "store.json").read_bytes())


async def refused(folder: Path, keys: EncryptionKeys, word: type[TransferError], match: str, *, writes: bool) -> None:
    """Nothing has changed, and what it says is one line."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    async with opened(folder, keys, writes=writes) as store:
        with pytest.raises(word, match=match) as raised:
            await (store.put(MANIFEST, b"{}") if writes else read_whole(store, MANIFEST, 100))
    assert "\n" not in str(raised.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


async def test_an_empty_store_becomes_an_encrypted_one_where_there_is_a_key(folder: Path, keys: EncryptionKeys) -> None:
    await put(folder, keys)
    assert said(folder) == {"version": 1, "encryption": next(iter(keys.all()))}
    assert not [path for path in folder.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    await got(folder, keys)


async def test_and_a_plain_one_where_there_is_none(folder: Path, none: EncryptionKeys, keys: EncryptionKeys) -> None:
    await put(folder, none)
    assert said(folder) == {"version": 1, "encryption": None}
    assert (folder / chunk_key(CHUNK.hash)).read_bytes() == RANDOM
    for reader in (none, keys):
        await got(folder, reader)


async def test_none_is_begun_in_plain_where_that_is_not_allowed(folder: Path, none: EncryptionKeys, keys: EncryptionKeys) -> None:
    async def begins(by: EncryptionKeys) -> None:
        store = OpenedStore(Directory(folder), by, writes=True, begins_plain=False)
        try:
            await store.put(MANIFEST, b"{}")
        finally:
            await store.close()

    with pytest.raises(Denied, match=r"is empty, and .*/no-keys has no encryption.key, so that what is put there"):
        await begins(none)
    assert not any(folder.rglob("*.json")), "nothing was put there"
    await put(folder, none)
    await begins(none)  # it is plain already
    shutil.rmtree(folder)
    folder.mkdir()
    await begins(keys)


async def test_a_store_of_before_there_was_encryption_stays_plain_and_readable(
    folder: Path, none: EncryptionKeys, keys: EncryptionKeys
) -> None:
    await put(folder, none)
    (folder / "store.json").unlink()
    await put(folder, none)
    assert not (folder / "store.json").exists()
    await got(folder, keys)
    await refused(
        folder, keys, Denied, r"is not encrypted, and this node encrypts by key \w{16}: put snapshots into another store", writes=True
    )


async def test_a_node_with_a_key_puts_nothing_into_a_plain_store(folder: Path, none: EncryptionKeys, keys: EncryptionKeys) -> None:
    await put(folder, none)
    await refused(folder, keys, Denied, "is not encrypted, and this node encrypts by key", writes=True)


async def test_without_its_key_nothing_is_put_or_read(folder: Path, none: EncryptionKeys, keys: EncryptionKeys, tmp_path: Path) -> None:
    await put(folder, keys)
    identity = next(iter(keys.all()))
    await refused(folder, none, Denied, rf"by key {identity}, and .*no-keys has no key to decrypt by: bring it there", writes=False)
    await refused(folder, none, Denied, rf"by key {identity}, and .*no-keys has no encryption\.key: bring it there", writes=True)
    other = EncryptionKeys(tmp_path / "other")
    other.make()
    await refused(folder, other, Denied, rf"by key {identity}, and .*other has {next(iter(other.all()))}: bring that one", writes=False)
    await refused(folder, other, Denied, rf"by key {identity}, and .*other has not that one but", writes=True)


async def test_a_key_that_was_removed_reads_no_longer(folder: Path, keys: EncryptionKeys) -> None:
    await put(folder, keys)
    first = next(iter(keys.all()))
    keys.make()
    await got(folder, keys)
    (keys.folder / "encryption" / f"{first}.key").unlink()
    await refused(folder, keys, Denied, f"is encrypted by key {first}", writes=False)


async def test_a_change_of_keys_is_over_when_all_was_put_again(folder: Path, keys: EncryptionKeys) -> None:
    await put(folder, keys)
    first, second = next(iter(keys.all())), keys.make()
    await put(folder, keys, PAGES)
    assert said(folder) == {"version": 1, "encryption": second}
    async with opened(folder, keys) as store:  # of the first key still
        target = bytearray(CHUNK.size)
        await Fetch(lambda chunk: [store]).bring(CHUNK, memoryview(target))
    await put(folder, keys)
    (keys.folder / "encryption" / f"{first}.key").unlink()
    await got(folder, keys)
    await got(folder, keys, PAGES)


@pytest.mark.parametrize("how", ["plain", "gone"])
async def test_a_description_that_was_changed_to_plain_leads_to_no_byte_in_clear_and_is_told(
    folder: Path, keys: EncryptionKeys, none: EncryptionKeys, how: str
) -> None:
    await put(folder, keys)
    if how == "plain":
        (folder / "store.json").write_text('{"version": 1, "encryption": null}')
    else:
        (folder / "store.json").unlink()
    await refused(folder, keys, Denied, "is not encrypted, and this node encrypts", writes=True)
    for reader in (keys, none):
        await refused(folder, reader, Altered, r"is encrypted, and store\.json there says that the store is not, or is gone", writes=False)


async def test_a_plain_store_that_was_changed_to_encrypted_gives_nothing(folder: Path, keys: EncryptionKeys, none: EncryptionKeys) -> None:
    await put(folder, none)
    (folder / "store.json").write_text(json.dumps({"version": 1, "encryption": next(iter(keys.all()))}))
    await refused(folder, keys, Altered, "is not encrypted", writes=False)


@pytest.mark.parametrize(
    ("data", "word", "match"),
    [
        ("", Altered, r"store\.json of file://.* is torn: bring it back"),
        ("{}", Altered, "is torn"),
        ("[1]", Altered, "is torn"),
        ('{"version": 1, "encryption": 5}', Altered, "is torn"),
        ('{"version": 1, "encryption": "../key"}', Altered, "is torn"),
        ('{"version": 2, "encryption": null}', Denied, "has version 2, and this zerowake knows 1"),
    ],
)
@pytest.mark.parametrize("writes", [False, True])
async def test_a_description_that_cannot_be_read(
    folder: Path, keys: EncryptionKeys, data: str, word: type[TransferError], match: str, *, writes: bool
) -> None:
    (folder / "store.json").write_text(data)
    await refused(folder, keys, word, match, writes=writes)


async def test_a_file_that_is_no_key_is_named(folder: Path, keys: EncryptionKeys) -> None:
    await put(folder, keys)
    keys.writes_by.write_text("no key")
    for writes in (False, True):
        await refused(folder, keys, Denied, rf"{keys.writes_by} is no key", writes=writes)


async def test_a_folder_that_is_not_mounted_is_no_empty_store(folder: Path, keys: EncryptionKeys) -> None:
    folder.rmdir()
    async with opened(folder, keys, writes=True) as store:
        with pytest.raises(Unreachable, match="mount it"):
            await store.put(MANIFEST, b"{}")
        folder.mkdir()
        await store.put(MANIFEST, b"{}")
    assert (folder / "store.json").exists()


@pytest.mark.parametrize("encrypted", [True, False])
async def test_names_of_objects_as_a_list_has_them(folder: Path, keys: EncryptionKeys, none: EncryptionKeys, *, encrypted: bool) -> None:
    ours = keys if encrypted else none
    await put(folder, ours)
    async with opened(folder, ours) as store:
        await store.put("collecting/1", b"")
        listed = {stored.key async for stored in store.objects("")}
        names = await store.names([chunk_key(CHUNK.hash), MANIFEST])
        assert listed == names | {"store.json", "collecting/1"}
        assert (chunk_key(CHUNK.hash) in names) != encrypted
        for name in names:
            await store.remove(name)
        with pytest.raises(Absent):
            await store.size(chunk_key(CHUNK.hash))


async def test_in_a_bucket(bucket: str, s3: S3Server, keys: EncryptionKeys, none: EncryptionKeys) -> None:
    root = s3.root / bucket / "fleet"
    async with opened(Bucket(bucket, "fleet"), keys, writes=True) as store:
        for data in (RANDOM, PAGES):
            await store.put(chunk_key(chunk_of(data).hash), memoryview(data))
            assert await store.size(chunk_key(chunk_of(data).hash)) == len(data)
        await store.put(MANIFEST, b"{}")
        await store.put(name_key("a", "b"), b"record")
    assert said(root) == {"version": 1, "encryption": next(iter(keys.all()))}
    assert sum(path.stat().st_size for path in root.rglob("chunks/*/*")) < len(RANDOM) + 0.5 * len(PAGES)
    async with opened(Bucket(bucket, "fleet"), keys) as store, opened(Bucket(bucket, "fleet"), none) as blind:
        for data in (RANDOM, PAGES):
            target = bytearray(len(data))
            await Fetch(lambda chunk, store=store: [store]).bring(chunk_of(data), memoryview(target))
            assert target == data
        assert await read_whole(store, name_key("a", "b"), 100) == b"record"
        with pytest.raises(Denied, match="has no key to decrypt by"):
            await read_whole(blind, MANIFEST, 100)
        [name] = await store.names([chunk_key(CHUNK.hash)])
        damaged = root / name
        shutil.copy(damaged, damaged.with_suffix(".kept"))
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(data)
        with pytest.raises(Altered, match="was changed, or belongs under another name"):
            await read_whole(store, chunk_key(CHUNK.hash), 1 << 30)
        damaged.write_bytes(data[:100_000])
        with pytest.raises(Altered, match="is cut off"):
            await read_whole(store, chunk_key(CHUNK.hash), 1 << 30)
        (root / "store.json").write_text('{"version": 1, "encryption": null}')
    async with opened(Bucket(bucket, "fleet"), keys) as store:
        with pytest.raises(Altered, match="somebody changed it"):
            await read_whole(store, MANIFEST, 100)
    async with opened(Bucket(bucket, "fleet"), keys, writes=True) as store:
        with pytest.raises(Denied, match="is not encrypted"):
            await store.put(MANIFEST, b"{}")
