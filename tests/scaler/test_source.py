"""Numbers that a queue can have, and URLs that can be asked."""

import math

import pytest
from pydantic import ValidationError

from scaler.sources.prometheus import PrometheusDeclaration
from scaler.sources.source import SourceError, whole


@pytest.mark.parametrize(("value", "requests"), [(0, 0), (3, 3), (0.01, 1), (2.5, 3), (3.0000000001, 3), (1e9, 10**9)])
def test_parts_of_requests_are_rounded_up(value: float, requests: int) -> None:
    assert whole(value, str(value)) == requests


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, -0.5, 1e10])
def test_what_is_no_number_of_requests(value: float) -> None:
    with pytest.raises(SourceError, match=r"is no number of requests: it must be between 0 and 1e\+09"):
        whole(value, str(value))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("prometheus:9090", "is no URL such as http://"),
        ("http://", "is no URL"),
        ("http://p:9090/?query=up", "is no URL"),
        ("http://user:hush@p:9090", "the URL has a user in it"),
    ],
)
def test_urls_that_are_none(url: str, why: str) -> None:
    with pytest.raises(ValidationError, match=why) as caught:
        PrometheusDeclaration(type="prometheus", url=url, query="up")
    assert "hush" not in "".join(each["msg"] for each in caught.value.errors())


def test_a_slash_at_the_end_changes_nothing() -> None:
    assert PrometheusDeclaration(type="prometheus", url="http://p/prefix/", query="up").says == "query up at http://p/prefix"
