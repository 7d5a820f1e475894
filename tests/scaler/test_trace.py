"""Traces: what is read, what is made, and what is refused, with its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scaler.simulate.trace import BadTrace, daily, read_csv, read_servegen


def csv(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


def test_a_csv_is_sorted_and_begins_at_zero(tmp_path: Path) -> None:
    found = read_csv(csv(tmp_path, "time,model,tokens\n20,b,5\n10.5,a,7\n\n30,b,0\n"))
    assert found.models == ["b", "a"]
    assert (found.at.tolist(), found.model.tolist(), found.tokens.tolist()) == ([0.0, 9.5, 19.5], [1, 0, 0], [7.0, 5.0, 0.0])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1,a,2\n2,a\n", "line 2: it has 2 fields, not the three of time, model, tokens"),
        ("1,a,2\nsoon,a,2\n", "line 2: the time is 'soon', which is no number"),
        ("1,a,2\n-3,a,2\n", "line 2: the time is -3: it must be 0 or more, and finite"),
        ("1,a,2\n\n3,a,nan\n", "line 3: the number of tokens is nan"),
        ("1,a,2\n2,c,2\n", "line 2: the model 'c' is none of models.list"),
        ("1,,2\n", "line 1: the model is missing"),
        ("time,model,tokens\n", "has no requests"),
    ],
)
def test_an_impossible_line_is_named(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(BadTrace) as raised:
        read_csv(csv(tmp_path, text), ["a", "b"])
    assert why in str(raised.value)


def client(folder: Path, name: str, rates: list[float]) -> None:
    rows = [f"{600 * number},{rate},1.0,{'Gamma,1.0,0.1' if rate else ',,'}\n" for number, rate in enumerate(rates)]
    (folder / name).write_text("".join(rows))


def test_servegens_clients_become_models_shifted_and_thinned(tmp_path: Path) -> None:
    client(tmp_path, "chunk-0-trace.csv", [1.0, 0.0, 0.0, 0.0])
    client(tmp_path, "chunk-1-trace.csv", [0.0, 0.0, 0.5, 0.5])
    whole = read_servegen(tmp_path, 4, 1.0, 1.0, 10.0, 0.0, np.random.default_rng(1))
    assert whole.seconds == 2400
    assert np.bincount(whole.model).tolist() == [600, 600, 600, 600]
    assert (whole.at >= 0).all() and (whole.at < 2400).all() and (np.diff(whole.at) >= 0).all()
    spans = [np.ptp((times := whole.at[whole.model == model]) - times[0]) for model in (0, 2)]
    assert min(spans) <= 600  # one window of them, unless it was shifted over the end
    thinned = read_servegen(tmp_path, 4, 1.0, 0.1, 10.0, 0.0, np.random.default_rng(1))
    assert 150 < len(thinned.at) < 330
    capped = read_servegen(tmp_path, 4, 1.0, 1.0, 0.05, 0.0, np.random.default_rng(1))
    assert np.bincount(capped.model)[0] < 60


def test_the_same_seed_gives_the_same_trace(tmp_path: Path) -> None:
    client(tmp_path, "chunk-0-trace.csv", [1.0, 0.2, 0.0])
    first, again, other = (read_servegen(tmp_path, 3, 0.7, 0.3, 1.0, 0.0, np.random.default_rng(seed)).at.tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0,1,1,Gamma,1,1\n600,x,1,Gamma,1,1\n", "line 2: the rate is 'x', which is no number"),
        ("0,1,1,Gamma,1,1\n0,1,1,Gamma,1,1\n", "line 2: the window starts at 0 s, no later than the one before"),
        ("0,1,1\n", "line 1: it has 3 fields, not the six of a ServeGen window"),
        ("0,1,1,Gamma,1,1\n", "has 1 windows: two are the least"),
    ],
)
def test_an_impossible_window_is_named(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "chunk-3-trace.csv").write_text(text)
    with pytest.raises(BadTrace) as raised:
        read_servegen(tmp_path, 1, 1.0, 1.0, 1.0, 0.0, np.random.default_rng(1))
    assert why in str(raised.value) and "chunk-3-trace.csv" in str(raised.value)


def test_a_folder_without_clients_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadTrace, match="has no CSV of a ServeGen client"):
        read_servegen(tmp_path, 1, 1.0, 1.0, 1.0, 0.0, np.random.default_rng(1))


def test_a_daily_mix_keeps_to_each_models_hour() -> None:
    found = daily(5, 20, 10, 600, 0.0, 0.0, np.random.default_rng(3))
    for model in range(5):
        angle = found.at[found.model == model] / 86400 * 2 * np.pi
        assert abs(np.exp(1j * angle).mean()) > 0.99  # all at one time of the day
    with pytest.raises(BadTrace, match="the trace has no requests"):
        daily(1, 0.001, 0.001, 600, 0.0, 0.0, np.random.default_rng(3))
