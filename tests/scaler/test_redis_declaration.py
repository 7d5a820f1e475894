"""What is wrong with a declared key of Redis is said before anything is begun."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from scaler.sources.redis_declaration import RedisDeclaration

URL = "redis://r:6379/0"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"url": URL}, "give either list or stream"),
        ({"url": URL, "list": "a", "stream": "b"}, "give either list or stream"),
        ({"url": URL, "list": "a", "group": "g"}, "group goes with stream"),
        ({"url": URL, "list": "a", "password_env": "NO_SUCH"}, "there is no variable NO_SUCH in the environment"),
        ({"url": URL, "list": "a", "password_file": "f", "password_env": "NO_SUCH"}, "give either password_file or password_env"),
        ({"url": "redis://u:hush@r", "list": "a"}, "the URL has a password in it"),
        ({"url": "redis://r?password=hush", "list": "a"}, "is no URL of Redis"),
        ({"url": "redis://r/zero", "list": "a"}, "is no URL of Redis"),
        ({"url": "http://r", "list": "a"}, "is no URL of Redis"),
        ({"url": "redis://r:99999", "list": "a"}, "Port out of range"),
        ({"url": URL, "list": "a", "interval_seconds": 0}, "greater than or equal to 0.1"),
    ],
)
def test_what_is_wrong(fields: dict[str, object], why: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(why)):
        RedisDeclaration.model_validate({"type": "redis"} | fields)


def test_what_it_says_of_itself() -> None:
    declared = RedisDeclaration(type="redis", url=URL, stream="jobs", group="workers", password_file=Path("secret"))
    assert declared.says == "stream jobs, group workers at redis://r:6379/0"
    assert declared.beside(Path("/etc")).password_file == Path("/etc/secret")
    assert RedisDeclaration(type="redis", url="unix:///run/redis.sock", list="jobs").says == "list jobs at unix:///run/redis.sock"
