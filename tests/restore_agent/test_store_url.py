"""Which URLs are stores, and what is said of those that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from restore_agent.snapshots.keyring import Keyring
from restore_agent.transfer.store_url import InvalidUrl, opened, opened_to_write, store_at


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("file:///var/lib/a%20b", "file:///var/lib/a b"),
        ("s3://models", "s3://models"),
        ("s3://models/", "s3://models"),
        ("s3://models/fleet/one/", "s3://models/fleet/one"),
    ],
)
async def test_folders_and_buckets_are_stores(url: str, name: str, tmp_path: Path) -> None:
    keyring = Keyring(tmp_path)
    async with opened([url], keyring) as stores, opened_to_write(url, keyring) as written:
        assert [str(store) for store in [*stores, written]] == [name, name]


@pytest.mark.parametrize("url", ["", "/var/lib", "file://", "file:///", "file://host/a", "s3:///a", "https://models/a", "s3://"])
def test_other_urls_are_none(url: str) -> None:
    with pytest.raises(InvalidUrl, match=r"is no URL of a store: file:///a/folder, s3://bucket or"):
        store_at(url)


def test_a_secret_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidUrl, match="has no credentials") as raised:
        store_at("s3://key:hidden@models/a")
    assert "hidden" not in str(raised.value)


def test_a_url_with_a_query_is_refused() -> None:
    with pytest.raises(InvalidUrl, match=r"has no \? and no #"):
        store_at("s3://models/a?versionId=3")
