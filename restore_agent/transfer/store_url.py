"""URLs of stores: `file:///a/folder` and `s3://bucket/prefix`. They hold no credentials: they are shown, logged and kept in manifests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from restore_agent.errors import AgentError, ErrorKind
from restore_agent.snapshots.encryption_keys import EncryptionKeys
from restore_agent.snapshots.keyring import Keyring
from restore_agent.transfer.bucket import Bucket
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.opened_store import OpenedStore


class InvalidUrl(AgentError, ValueError):
    """It names no store."""

    kind = ErrorKind.INVALID
    reason = "invalid"


def store_at(url: str) -> Directory | Bucket:
    """Nothing is asked of it yet. Raises InvalidUrl; Denied: credentials that the environment names cannot be read."""
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise InvalidUrl(f"{parts.scheme}://…@{parts.hostname}: a URL of a store has no credentials; set AWS_ACCESS_KEY_ID and its like")
    if parts.query or parts.fragment:
        raise InvalidUrl(f"{url}: a URL of a store has no ? and no #")
    if parts.scheme == "file" and not parts.netloc and parts.path.strip("/"):
        return Directory(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        return Bucket(parts.netloc, unquote(parts.path).strip("/"))
    raise InvalidUrl(f"{url!r} is no URL of a store: file:///a/folder, s3://bucket or s3://bucket/prefix")


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
async def opened_to_write(url: str, keyring: Keyring) -> AsyncIterator[OpenedStore]:
    """As `opened`, to put snapshots into it."""
    store = OpenedStore(store_at(url), EncryptionKeys(keyring.folder), writes=True)
    try:
        yield store
    finally:
        await store.close()
