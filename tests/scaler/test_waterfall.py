"""Which activation `zerowake trace` is told of, and what."""

import asyncio
import uuid
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from scaler.books.activation import Activations, TraceContext
from scaler.programs import asking, commands
from scaler.view.status import serve_in_pod
from scaler.view.waterfall import Waterfalls, shown


@pytest.fixture
def activations() -> Activations:
    """One that is open, and two that have ended."""
    made = Activations()
    now = made.clock.now()
    for model, at in (("old", now - 30), ("new", now - 20), ("open", now - 25)):
        activation = made.begin(model, at)
        activation.mark("held", at + 0.25)
        activation.add("weights", 0.5, at + 1, at + 2)
    made.abandoned("old", "the client left")
    made.answered("new", handed=now - 18, at=now - 17.5)
    return made


def test_phases_are_where_they_were(activations: Activations) -> None:
    (activation, *_) = activations.recent()
    activation.trace = TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    activation.origin = "restored"
    found = shown(activation)
    assert [(each.name, round(each.begins_seconds, 6), round(each.seconds, 6)) for each in found.phases] == [
        ("held", 0.0, 0.25),
        ("weights", 1.0, 0.5),
        ("first_byte", 2.0, 0.5),
    ]
    assert (found.outcome, found.origin, found.reason) == ("served", "restored", None)
    assert (found.seconds, found.unaccounted_seconds) == (pytest.approx(2.5), pytest.approx(1.25))
    assert found.trace == "0af7651916cd43dd8448eb211c80319c"


def test_one_is_found_by_its_id_by_the_beginning_of_that_and_as_the_last(activations: Activations) -> None:
    view = Waterfalls(activations)
    (opened,) = activations.open()
    new, old = activations.recent()
    assert view.found(old.id) == [old]
    assert view.found(opened.id) == [opened]
    assert new in view.found(new.id[:4])
    assert view.found("last") == [new], "the one that began last"
    assert set(view.found("")) == {opened, new, old}
    assert view.found("xyz") == []
    assert Waterfalls(Activations()).found("last") == []


async def test_it_is_asked_over_http(activations: Activations) -> None:
    app = web.Application()
    app.add_routes(Waterfalls(activations).routes)
    new, old = activations.recent()
    async with TestClient(TestServer(app)) as client:
        async with client.get(f"/trace/{old.id}") as response:
            told = await response.json()
            assert (response.status, told["id"], told["reason"]) == (200, old.id, "the client left")
        async with client.get("/trace/xyz") as response:
            told = await response.json()
            assert response.status == 404
            assert set(told["known"]) == {new.id, old.id, activations.open()[0].id}


async def test_in_a_pod_its_scaler_is_asked(
    activations: Activations, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"\0zerowake-test-{uuid.uuid4()}"
    monkeypatch.setattr(asking, "SCALER_SOCKET", name)
    monkeypatch.setattr(asking, "_DEFAULT_STATE", Path("/nowhere"))
    new = activations.recent()[0]
    async with serve_in_pod(Waterfalls(activations).routes, name):
        await asyncio.to_thread(commands.trace, new.id)
    assert f"activation:  {new.id}" in capsys.readouterr().out
