"""Which URLs name stores, and what is said of those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from zerowake_shared.store_url import InvalidStoreUrl, StoreUrl


@pytest.mark.parametrize(
    ("url", "store"),
    [
        ("file:///var/lib/a%20b", StoreUrl(folder=Path("/var/lib/a b"))),
        ("s3://models", StoreUrl(bucket="models")),
        ("s3://models/fleet/one/", StoreUrl(bucket="models", prefix="fleet/one")),
    ],
)
def test_folders_and_buckets_are_named(url: str, store: StoreUrl) -> None:
    assert StoreUrl.parse(url) == store


@pytest.mark.parametrize(
    "url", ["", "models", "/var/lib", "file://", "file:///", "file://host/a", "s3:///a", "https://m/a", "s3://", "s3://[a"]
)
def test_others_are_none(url: str) -> None:
    with pytest.raises(InvalidStoreUrl, match=r"is no URL of a store: file:///a/folder, s3://bucket or"):
        StoreUrl.parse(url)


def test_a_secret_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidStoreUrl, match="has no credentials") as raised:
        StoreUrl.parse("s3://key:hidden@models/a")
    assert "hidden" not in str(raised.value)


def test_a_query_is_refused() -> None:
    with pytest.raises(InvalidStoreUrl, match=r"has no \? and no #"):
        StoreUrl.parse("s3://models/a?versionId=3")
