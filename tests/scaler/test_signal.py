"""Listeners of the ledger."""

import pytest

from scaler.books.signal import Signal


def test_all_are_told_in_their_order_whatever_one_of_them_does(caplog: pytest.LogCaptureFixture) -> None:
    signal, told = Signal(), list[str]()
    signal(lambda model: told.append(f"first {model}"))
    signal(lambda model: told.extend(model / 0))  # type: ignore[operator]
    signal(lambda model: told.append(f"last {model}"))
    signal.tell("m")
    assert told == ["first m", "last m"]
    assert [(record.message, record.fields) for record in caplog.records] == [("a listener failed", {"model": "m"})]  # type: ignore[attr-defined]
