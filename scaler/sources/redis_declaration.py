"""What a user writes of a key in Redis whose length is demand. The password is in a file or a variable, since URLs are shown."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from scaler.sources.source import Polled, Source, Surroundings


def _redis_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.password is not None:
        raise ValueError("the URL has a password in it, and URLs are shown: name its file (password_file) or variable (password_env)")
    socket = parts.scheme == "unix" and parts.path
    server = parts.scheme in ("redis", "rediss") and parts.hostname and re.fullmatch(r"/?\d*", parts.path)
    _ = parts.port  # which raises what is wrong with it
    if not (socket or server) or parts.query or parts.fragment:
        raise ValueError(f"{value!r} is no URL of Redis, such as redis://HOST:6379/0, rediss://HOST:6379 or unix:///SOCKET")
    return value


class RedisDeclaration(Polled):
    """url: redis://[USER@]HOST:PORT/DATABASE, rediss:// with TLS, or unix:///SOCKET. list, or stream and perhaps group: whose length it
    is."""

    type: Literal["redis"]
    url: Annotated[str, AfterValidator(_redis_url)]
    list: str = ""
    stream: str = ""
    group: str = ""
    password_file: Path | None = None
    password_env: str = ""
    interval_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 1.0

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if bool(self.list) == bool(self.stream):
            raise ValueError("give either list or stream: the key whose length counts")
        if self.group and not self.stream:
            raise ValueError("group goes with stream: a list has none")
        if self.password_file and self.password_env:
            raise ValueError("give either password_file or password_env")
        if self.password_env and self.password_env not in os.environ:
            raise ValueError(f"password_env: there is no variable {self.password_env} in the environment")
        return self

    @property
    def says(self) -> str:
        what = f"list {self.list}" if self.list else f"stream {self.stream}"
        return f"{what}{f', group {self.group}' if self.group else ''} at {self.url}"

    def beside(self, folder: Path) -> Self:
        return self.model_copy(update={"password_file": folder / self.password_file}) if self.password_file else self

    def open(self, model: str, around: Surroundings) -> Source:
        # Not above: the client of Redis takes longer to import than `zerowake status` to answer.
        from scaler.sources.redis_lengths import RedisLength  # noqa: PLC0415

        return RedisLength(self, around.lookup)
