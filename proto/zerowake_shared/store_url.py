"""URLs of stores of snapshots: `file:///a/folder` and `s3://bucket/prefix`. They hold no credentials: they are shown and logged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit


class InvalidStoreUrl(ValueError):
    """It names no store; the text says how one is named, in one line."""


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A folder, or a bucket and a prefix in it, which may be empty."""

    folder: Path | None = None
    bucket: str = ""
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> StoreUrl:
        """Raises InvalidStoreUrl."""
        try:
            parts = urlsplit(url)
        except ValueError:
            raise _no_url(url) from None
        if parts.username or parts.password:
            raise InvalidStoreUrl(
                f"{parts.scheme}://…@{parts.hostname}: a URL of a store has no credentials; set AWS_ACCESS_KEY_ID and its like"
            )
        if parts.query or parts.fragment:
            raise InvalidStoreUrl(f"{url}: a URL of a store has no ? and no #")
        if parts.scheme == "file" and not parts.netloc and parts.path.strip("/"):
            return cls(folder=Path(unquote(parts.path)))
        if parts.scheme == "s3" and parts.netloc:
            return cls(bucket=parts.netloc, prefix=unquote(parts.path).strip("/"))
        raise _no_url(url)


def _no_url(url: str) -> InvalidStoreUrl:
    return InvalidStoreUrl(f"{url!r} is no URL of a store: file:///a/folder, s3://bucket or s3://bucket/prefix")
