"""What is saved is what is loaded; what is torn, foreign or of another version is told once and does no harm."""

import json
import os
from pathlib import Path

import pytest

from scaler.forecast.forecast import Forecast
from scaler.forecast.state_file import load, save
from tests.worlds.exhausted import descriptors_left

BEGIN = 1_800_000_000.0


@pytest.fixture
def forecast() -> Forecast:
    """Of 100 models, each of which was asked for several times, and some are being asked for."""
    forecast = Forecast()
    for number in range(100):
        forecast.declare(f"team/m{number}", BEGIN)
    for minute in range(1, 30):
        at = BEGIN + 60.0 * minute
        for number in range(0, 100, minute):
            forecast.began(f"team/m{number}", at - 30 + number / 10)
        for number in range(0, 100, minute):
            forecast.ended(f"team/m{number}", at - 15 + number / 10)
        forecast.judge(at)
    forecast.began("team/m7", BEGIN + 1790)
    return forecast


def test_a_restart_is_no_restart(forecast: Forecast, tmp_path: Path) -> None:
    save(tmp_path / "forecast", forecast.state())
    state = load(tmp_path / "forecast")
    assert state is not None
    restored = Forecast.restored(state, BEGIN + 1795)
    forecast.ended("team/m7", BEGIN + 1795)  # its request was that of the program that has ended
    for each in (forecast, restored):
        each.began("team/m3", BEGIN + 1799)
        each.judge(BEGIN + 1800)
        each.declare("new", BEGIN + 1800)
    assert restored.score == forecast.score
    assert restored.chances(BEGIN + 1810, 60.0) == forecast.chances(BEGIN + 1810, 60.0)
    assert restored.state().models == forecast.state().models
    assert restored.state().rows.tobytes() == forecast.state().rows.tobytes()
    assert restored.is_worth_it() == forecast.is_worth_it()


def test_what_was_stated_before_a_long_pause_is_not_judged(forecast: Forecast) -> None:
    restored = Forecast.restored(forecast.state(), BEGIN + 86_400)
    restored.judge(BEGIN + 86_400)
    assert restored.score == forecast.score
    restored.judge(BEGIN + 86_460)
    assert restored.score.statements == forecast.score.statements + 100


def test_a_clock_that_was_set_back_meanwhile_makes_nobody_younger(forecast: Forecast) -> None:
    back = Forecast.restored(forecast.state(), BEGIN - 1e6)
    straight = Forecast.restored(forecast.state(), BEGIN + 1790)
    assert back.chances(BEGIN - 1e6, 60.0) == pytest.approx(straight.chances(BEGIN + 1790, 60.0))


def test_before_the_first_save_there_is_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(tmp_path / "forecast") is None
    assert not caplog.records


def test_an_empty_forecast_can_be_kept(tmp_path: Path) -> None:
    save(tmp_path / "forecast", Forecast().state())
    state = load(tmp_path / "forecast")
    assert state is not None
    assert Forecast.restored(state, BEGIN).models == []


@pytest.mark.parametrize(
    "break_it",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:50], id="torn in its head"),
        pytest.param(lambda data: data[:-1], id="torn in its rows"),
        pytest.param(lambda data: data[:-9] + b"x" + data[-8:], id="damaged"),
        pytest.param(lambda data: b'{"models": []}\n', id="foreign"),
        pytest.param(lambda data: b"[]\n", id="other JSON"),
        pytest.param(lambda data: b"\xff\xfe\n" * 9, id="not even text"),
        pytest.param(lambda data: data.replace(b'"forecast": 1', b'"forecast": 0'), id="of another version"),
        pytest.param(lambda data: data.replace(b"hour_came", b"hour_gone"), id="with other columns"),
        pytest.param(lambda data: data.replace(b'm0", ', b'm1", '), id="a model twice"),
        pytest.param(lambda data: data.replace(b'"hits"', b'"hots"'), id="another score"),
    ],
)
def test_what_cannot_be_read_is_told_once(break_it: object, forecast: Forecast, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "forecast"
    save(path, forecast.state())
    whole = path.read_bytes()
    assert callable(break_it)
    broken = break_it(whole)
    assert broken != whole
    path.write_bytes(broken)
    assert load(path) is None
    (record,) = caplog.records
    assert str(path) in record.message
    assert "begins anew" in record.message
    save(path, forecast.state())
    assert load(path) is not None


def test_a_folder_in_its_place_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(tmp_path) is None
    assert len(caplog.records) == 1


def test_what_could_not_be_read_for_a_moment_is_kept(forecast: Forecast, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "forecast", forecast.state())
    with descriptors_left(0):
        assert load(tmp_path / "forecast") is None
    save(tmp_path / "forecast", Forecast().state())
    assert f"kept in {tmp_path / 'forecast.unread'}" in caplog.text
    assert load(tmp_path / "forecast.unread") is not None


def test_a_disk_that_refuses_leaves_the_old_file_and_nothing_else(
    forecast: Forecast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "forecast", Forecast().state())
    before = (tmp_path / "forecast").read_bytes()

    def full(fd: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "forecast", forecast.state())
    assert [path.name for path in tmp_path.iterdir()] == ["forecast"]
    assert (tmp_path / "forecast").read_bytes() == before
    assert json.loads(before.partition(b"\n")[0])["models"] == []
