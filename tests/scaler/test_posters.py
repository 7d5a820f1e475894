"""Whose tokens let their bearers tell of demand, by what the API server says of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from scaler.kubernetes.posters import Posters
from scaler.sources.push import Denied
from tests.worlds.kubernetes_api import Api

OWNERS = {"m": "tenant", "n": "other"}


@pytest.fixture
def api() -> Api:
    made = Api()
    made.tokens = {"a.b.c": "system:serviceaccount:tenant:default", "u.s.r": "alice", "n.s.x": "system:serviceaccount:"}
    return made


class _Clock:
    moment = 0.0

    def now(self) -> float:
        return self.moment

    def wall(self) -> float:
        return self.moment


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
async def posters(api: Api, clock: _Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Posters]:
    async with api.connected(tmp_path, monkeypatch) as cluster:
        yield Posters(cluster, lambda model: OWNERS.get(model, ""), clock)


def reviews(api: Api) -> int:
    return sum(path.startswith("/apis/authentication.k8s.io/v1/tokenreviews") for _, path in api.requests)


async def test_a_service_account_tells_of_its_namespaces_models(api: Api, clock: _Clock, posters: Posters) -> None:
    permitted = await posters.permitted("Bearer a.b.c")
    assert [permitted(model) for model in ("m", "n", "nobody's")] == [True, False, False]
    await posters.permitted("Bearer a.b.c")
    assert reviews(api) == 1, "it is believed for a while"
    del api.tokens["a.b.c"]
    clock.moment = 61
    with pytest.raises(Denied, match="the token was not taken: invalid bearer token"):
        await posters.permitted("Bearer a.b.c")


async def test_an_account_without_a_namespace_tells_of_nothing(posters: Posters) -> None:
    permitted = await posters.permitted("Bearer n.s.x")
    assert not permitted("m") and not permitted("nobody's")


@pytest.mark.parametrize(
    ("header", "why", "asked"),
    [
        ("", "has to be: Bearer TOKEN", 0),
        ("Basic a.b.c", "has to be: Bearer TOKEN", 0),
        ("Bearer hush", "for the audience zerowake", 0),
        ("Bearer x.y.z", "was not taken: invalid bearer token", 1),
        ("Bearer u.s.r", "no token of a ServiceAccount", 1),
    ],
)
async def test_nobody_else_does(api: Api, posters: Posters, header: str, why: str, asked: int) -> None:
    with pytest.raises(Denied, match=why) as denied:
        await posters.permitted(header)
    assert (denied.value.status, reviews(api)) == (401, asked)


async def test_an_api_server_that_does_not_say(api: Api, posters: Posters) -> None:
    api.refuse.append(("POST", "tokenreviews", 403, "forbidden"))
    with pytest.raises(Denied, match="does not say whose the token is") as denied:
        await posters.permitted("Bearer a.b.c")
    assert denied.value.status == 503
    assert (await posters.permitted("Bearer a.b.c"))("m"), "that was not remembered"
