"""What a scale-up says of itself: phases, a log line, metrics."""

import json
import logging

import pytest
from prometheus_client import REGISTRY

from scaler.books.activation import Activations
from scaler.view.activations import record_activation
from zerowake_shared.log import JsonFormatter


def test_phases_and_what_none_of_them_accounts_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    activations = Activations()
    activations.on_end(record_activation)
    activation = activations.begin("phases", at=100.0)
    assert activations.begin("phases") is activation
    activation.mark("held", at=100.5)
    activation.mark("pushed", at=101.0)
    activation.mark("pushed", at=109.0)  # a second push is no part of it
    activation.add("image", 2.0)
    activation.add("weights", 1.0)  # longer than the image
    activation.add("image", 50.0)  # another replica's
    activation.made("parked")
    activation.made("restored")  # another replica's
    activation.add("first_byte", 0.25)
    activation.add("thawing", 0.25)  # a newer agent's
    activations.served("phases", at=105.0)
    assert activation.phases == {
        "held": 0.5,
        "pushed": 0.5,
        "image": 2.0,
        "weights": 1.0,
        "first_byte": 0.25,
        "thawing": 0.25,
        "unaccounted": 0.5,
    }
    assert list(activation.phases)[-3:] == ["first_byte", "thawing", "unaccounted"]
    assert activation.total == 5.0
    activation.add("cuda", 1.0)  # too late
    activation.made("cold")
    assert "cuda" not in activation.phases
    line = json.loads(JsonFormatter().format(caplog.records[-1]))
    assert (line["activation"], line["model"], line["outcome"], line["seconds"]) == (activation.id, "phases", "served", 5.0)
    assert (line["phases"]["unaccounted"], line["origin"]) == (0.5, "parked")
    assert REGISTRY.get_sample_value("zerowake_activation_seconds_sum", {"model": "phases", "origin": "parked"}) == 5.0
    labels = {"model": "phases", "phase": "image"}
    assert REGISTRY.get_sample_value("zerowake_activation_phase_seconds_sum", labels) == 2.0


def test_the_latest_come_first_and_old_ones_go() -> None:
    activations = Activations()
    for i in range(150):
        activations.begin(f"m{i}")
        activations.abandoned(f"m{i}", "the client left")
    assert [activation.model for activation in activations.recent(3)] == ["m149", "m148", "m147"]
    assert len(activations.recent(1000)) == 100
    activations.served("nobody's")  # without an open one this changes nothing
    assert len(activations.recent(1000)) == 100
