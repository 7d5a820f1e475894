"""The file of `zerowake up`: what is wrong with it is said by name."""

from pathlib import Path

import pytest

from scaler.local.config import BadConfig, load


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("models: {}", "models"),
        ("models: {a: {}}", "give a snapshot, a command, or both"),
        ("models: {a: {command: [x]}}", "port is missing"),
        ("models: {a: {snapshot: s, replicas: 3}}", "models.a.replicas"),
        ("models: {a: {snapshot: s, max_replicas: 0}}", "models.a.max_replicas"),
        ("models: {a: {snapshot: s, min_replicas: 3}}", "max_replicas is 1"),
        ("listen: nowhere\nmodels: {a: {snapshot: s}}", "is not HOST:PORT"),
        ("models: [", "is no YAML"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, content: str, word: str) -> None:
    file = tmp_path / "up.yaml"
    file.write_text(content)
    with pytest.raises(BadConfig, match=word):
        load(file)
