"""A scale-up's time in the cluster, split where its pod shows that a part is over."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from scaler.books.activation import Activations
from scaler.fleet.nodes import _account
from scaler.kubernetes.engine_pod import EnginePod
from scaler.kubernetes.startups import Startups
from tests.worlds.virtual_time import StandingClock


def pod(node: str = "", name: str = "one") -> EnginePod:
    made: dict[str, Any] = {"metadata": {"name": name, "uid": name}, "spec": {"containers": [], "nodeName": node}}
    return msgspec.convert(made, EnginePod)


@pytest.fixture
def clock() -> StandingClock:
    return StandingClock(100.0)


def test_what_the_cluster_does_is_told_apart(clock: StandingClock) -> None:
    activations = Activations(clock=clock)
    startups = Startups(activations, lambda _: "m")
    activation = activations.begin("m", 100.0)
    activation.mark("pushed", 100.1)
    for moment, old, new in (
        (100.4, None, pod()),
        (100.5, pod(), pod("n1")),
        (100.9, pod("n1"), pod("n1")),
        (101.0, None, pod("n2", "two")),
    ):
        clock.moment = moment
        startups.changed(old, new)
    _account(activation, [], 101.2)
    assert {name: round(seconds, 6) for name, seconds in activation.phases.items()} == {
        "pushed": 0.1,
        "created": 0.3,
        "scheduled": 0.1,
        "started": 0.7,
    }


def test_pods_that_nobody_waits_for_count_for_nothing(clock: StandingClock) -> None:
    activations = Activations(clock=clock)
    startups = Startups(activations, lambda pod: "other")
    activation = activations.begin("m", 100.0)
    startups.changed(None, pod("n1"))
    startups.changed(pod("n1"), None)
    assert not activation.phases
