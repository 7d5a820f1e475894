"""Stores by their URLs."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from restore_agent.errors import AgentError, ErrorKind
from restore_agent.snapshots.encryption_keys import EncryptionKeys
from restore_agent.snapshots.keyring import Keyring
from restore_agent.transfer.bucket import Bucket
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.opened_store import OpenedStore
from zerowake_shared.store_url import InvalidStoreUrl, StoreUrl


class InvalidUrl(AgentError, ValueError):
    """It names no store."""

    kind = ErrorKind.INVALID
    reason = "invalid"


def store_at(url: str) -> Directory | Bucket:
    """Nothing is asked of it yet. Raises InvalidUrl; Denied: credentials that the environment names cannot be read."""
    named = check_url(url)
    return Directory(named.folder) if named.folder else Bucket(named.bucket, named.prefix)


def check_url(url: str) -> StoreUrl:
    """Raises InvalidUrl."""
    try:
        return StoreUrl.parse(url)
    except InvalidStoreUrl as error:
        raise InvalidUrl(str(error)) from None


@contextlib.asynccontextmanager
async def opened(urls: Sequence[str], keyring: Keyring) -> AsyncIterator[list[OpenedStore]]:
    """All of them to read from, and to remove from, until the block ends; `keyring`: beside its keys lie those to decrypt by.

    Nothing is asked of them yet. Raises what `store_at` does.
    """
    async with contextlib.AsyncExitStack() as stack:
        stores = []
        for url in urls:
            stores.append(OpenedStore(store_at(url), EncryptionKeys(keyring.folder), writes=False))
            stack.push_async_callback(stores[-1].close)
        yield stores


@contextlib.asynccontextmanager
async def opened_to_write(url: str, keyring: Keyring, *, begins_plain: bool = True) -> AsyncIterator[OpenedStore]:
    """As `opened`, to put snapshots into it. begins_plain: as OpenedStore has it."""
    store = OpenedStore(store_at(url), EncryptionKeys(keyring.folder), writes=True, begins_plain=begins_plain)
    try:
        yield store
    finally:
        await store.close()
