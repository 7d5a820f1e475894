"""How a command prints what it has found for programs."""

from __future__ import annotations

import json

import pytest
import yaml

from zerowake_shared.output import Format, printed

FOUND = [{"name": "a", "bytes": 1 << 40, "why": None, "of": ["text: with a colon", "ä", ""]}]


@pytest.mark.parametrize(("output", "read"), [(Format.JSON, json.loads), (Format.YAML, yaml.safe_load)])
def test_it_is_read_as_it_was(capsys: pytest.CaptureFixture[str], output: Format, read: object) -> None:
    printed(FOUND, output)
    assert callable(read)
    assert read(capsys.readouterr().out) == FOUND
