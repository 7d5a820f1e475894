"""An activation as bars on a terminal."""

import io

import pytest
from rich.console import Console

from scaler.view.state import Activation, Phase
from scaler.view.waterfall_shown import columns_of, show

PHASES = (Phase("held", 0.0, 0.001), Phase("scheduled", 0.1, 0.1), Phase("image", 0.2, 0.4), Phase("first_byte", 0.9, 0.1))


def drawn(activation: Activation, width: int = 74) -> str:
    out = io.StringIO()
    show(Console(file=out, width=width, markup=False, highlight=False, emoji=False), activation)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def test_phases_are_bars_where_they_were_and_what_none_accounts_for_is_shown() -> None:
    activation = Activation("0123456789ab", "chat", "served", None, "restored", 0.0, 1.0, PHASES, 0.399, "0af7651916cd43dd8448eb211c80319c")
    text = drawn(activation)
    assert "trace:       0af7651916cd43dd8448eb211c80319c\n" in text
    assert "took:        1000.0 ms\n" in text
    table = text.partition("\n\n")[2].splitlines()
    column = table[4].index("█") - 36  # where the bars begin: first_byte's stands at nine tenths of forty columns
    assert [line[column:].rstrip() for line in table[1:]] == [
        "█",
        "    ████",
        "        ████████████████",
        " " * 36 + "████",
        " ░░░" + " " * 20 + "░" * 12,
    ]
    assert [line.split()[:3] for line in table[1:4]] == [
        ["held", "0.0", "1.0"],
        ["scheduled", "100.0", "100.0"],
        ["image", "200.0", "400.0"],
    ]
    assert table[5].split()[:2] == ["unaccounted", "399.0"]


def test_one_that_is_open_or_was_abandoned_says_so() -> None:
    text = drawn(Activation("0123456789ab", "chat", "open", None, None, 0.0, 1.0, (), None))
    assert "so far" in text and "unaccounted" not in text and "not known" in text and "trace:" not in text
    text = drawn(Activation("0123456789ab", "[chat]", "abandoned", "the [bold]client left", None, 0.0, 1.0, (), 1.0))
    assert "abandoned: the [bold]client left" in text and "[chat]" in text


def test_nothing_is_cut_off_where_a_program_reads_it() -> None:
    activation = Activation("0123456789ab", "chat", "served", None, "restored", 0.0, 1.0, PHASES, 0.4)
    assert "█" * 24 in drawn(activation, 100_000)
    assert "unaccounted" in drawn(activation, 46)


@pytest.mark.parametrize(
    ("begins", "took", "whole", "columns"),
    [(0, 1, 1, range(10)), (0.99, 0.001, 1, range(9, 10)), (0, 0, 1, range(0)), (0, 1, 0, range(0)), (1, 1, 1, range(9, 10))],
)
def test_a_bar_stands_within_its_columns(begins: float, took: float, whole: float, columns: range) -> None:
    assert columns_of(begins, took, whole, 10) == columns
