"""Requests a second, over the last minute, from what the ledger has counted."""

import pytest

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.view.request_rates import RequestRates
from tests.worlds.virtual_time import StandingClock


def begin(ledger: Ledger, requests: int) -> None:
    for _ in range(requests):
        ledger.start("chat")
        ledger.end("chat")


def test_over_the_last_minute() -> None:
    clock = StandingClock(0.0)
    ledger = Ledger({"chat": ModelLimits()}, Activations(clock))
    rates = RequestRates(ledger, clock)
    begin(ledger, 10)
    assert rates.of("chat") == 0.0, "within the first second nothing is known"
    clock.moment = 5.0
    assert rates.of("chat") == 2.0
    for _ in range(24):  # two minutes, in which nothing comes
        clock.moment += 5.0
        rates.look()
    assert rates.of("chat") == 0.0
    begin(ledger, 110)
    assert rates.of("chat") == pytest.approx(2.0), "the oldest look is 55 s old"


def test_a_model_that_was_declared_anew_is_counted_from_its_beginning() -> None:
    clock = StandingClock(0.0)
    ledger = Ledger({"chat": ModelLimits()}, Activations(clock))
    begin(ledger, 100)
    rates = RequestRates(ledger, clock)
    ledger.withdraw("chat")
    ledger.declare("chat", ModelLimits())
    clock.moment = 10.0
    assert rates.of("chat") == 0.0
    assert rates.of("nobody") == 0.0
