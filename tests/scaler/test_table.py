"""Rows that come and go, against a dictionary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.forecast.table import Table

BLANK = np.array((0.0, [7.0, 7.0]), np.dtype([("number", "f8"), ("pair", "f8", 2)]))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_each_model_keeps_its_own_row(steps: list[tuple[bool, int]]) -> None:
    table, expected = Table(BLANK), dict[str, float]()
    for number, (adds, model) in enumerate(steps):
        name = f"m{model}"
        if adds and name not in expected:
            place = table.add(name)
            assert table.rows[place] == BLANK, "nothing is left of who had the row before"
            table.rows["number"][place] = number
            table.rows["pair"][place] = number
            expected[name] = number
        elif not adds and name in expected:
            table.remove(name)
            del expected[name]
    assert dict(zip(table.models, table.rows["number"].tolist(), strict=True)) == expected
    for name, value in expected.items():
        place = table.place(name)
        assert place is not None
        assert table.rows["pair"][place].tolist() == [value, value]


def test_grows_and_keeps_what_it_has() -> None:
    table = Table(BLANK)
    for number in range(1000):
        place = table.add(f"m{number}")
        table.rows["number"][place] = number
    assert table.rows["number"].tolist() == list(range(1000))


def test_who_is_not_there_has_no_place_and_cannot_be_removed() -> None:
    table = Table(BLANK)
    assert table.place("chat") is None
    with pytest.raises(KeyError):
        table.remove("chat")
