"""What commands ask a running scaler, and what is said where none answers, or another version does."""

import uuid
from pathlib import Path

import pytest
import typer
from aiohttp import web

from scaler.programs import asking
from scaler.view.status import serve_in_pod


async def answer(_: web.Request) -> web.Response:
    return web.json_response({"at": 1})


async def test_without_a_state_folder_the_scaler_of_this_pod_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"\0zerowake-test-{uuid.uuid4()}"
    monkeypatch.setattr(asking, "SCALER_SOCKET", name)
    monkeypatch.setattr(asking, "_DEFAULT_STATE", tmp_path)
    async with serve_in_pod([web.get("/state", answer)], name):
        assert await asking.ask(None, "state") == b'{"at": 1}'
        with pytest.raises(typer.Exit):
            await asking.ask(tmp_path, "state")  # which was named, and nothing answers there


async def test_where_none_answers_it_is_said_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(asking, "SCALER_SOCKET", f"\0zerowake-test-{uuid.uuid4()}")
    monkeypatch.setattr(asking, "_DEFAULT_STATE", tmp_path)
    with pytest.raises(typer.Exit) as ended:
        await asking.ask(None, "state", " Or ask a pod.")
    assert ended.value.exit_code == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"zerowake: nothing answers on {tmp_path}/status.sock (No such file or directory); is `zerowake up` running")
    assert said.endswith("with this --state? Or ask a pod.")


async def test_a_scaler_of_another_version_is_named_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"\0zerowake-test-{uuid.uuid4()}"
    monkeypatch.setattr(asking, "socket_of", lambda state: name)
    async with serve_in_pod([], name):
        with pytest.raises(typer.Exit):
            await asking.ask(tmp_path, "state")
    assert "it does not know /state: it is of another version; restart it" in capsys.readouterr().err
