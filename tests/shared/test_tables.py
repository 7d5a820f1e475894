"""Tables of commands, where a program reads them."""

from __future__ import annotations

import pytest

from zerowake_shared import tables


def test_in_a_pipe_nothing_is_cut_off_or_taken_for_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = f"/{'long/' * 60}file"
    said = "[rank0]: CUDA error [/tmp] :smile: [red]unusable"
    found = tables.table("FILE", "NOTE")
    found.add_row(path, said)
    tables.console().print(found)
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["FILE", "NOTE"]
    assert row.split(maxsplit=1) == [path, said]
