"""What YAML lets pass and nobody means is an error with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaler.local.yaml_file import BadFile, lines_of, read_yaml


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' stands here and in line 1 already: leave one of them out"),
        ("m:\n  x:\n    port: 1\n    port: 1\n", "line 4: the key 'port' stands here and in line 3 already"),
        ("m:\n- {a: 1}\n- {b: 1, b: 2}\n", "line 3: the key 'b' stands here and in line 3 already"),
        ('"a": 1\na: 2\n', "line 2: the key 'a' stands here and in line 1 already"),
        ('{"a": 1,\n "a": 2}', "line 2: the key 'a' stands here and in line 1 already"),
        ("base: &b {x: 1}\nm:\n  <<: *b\n  y: 1\n  y: 2\n", "line 5: the key 'y' stands here and in line 4 already"),
        ("models:\n  no:\n    port: 1\n", "line 2: the key 'no' is no text for YAML, but a value of its own (bool): write it in quotes"),
        ("a: 1\n1: 2\n", "line 2: the key '1' is no text for YAML, but a value of its own (int)"),
        ("a:\n  2026-01-01: x\n", "line 2: the key '2026-01-01' is no text for YAML, but a value of its own (timestamp)"),
        ("a:\n  1.5: x\n", "line 2: the key '1.5' is no text"),
        ("a:\n  ~: x\n", "line 2: the key '~' is no text for YAML, but a value of its own (null)"),
        ("? [a, b]\n: 1\n", "line 1: a key is a list or a mapping of its own"),
        ("? {a: b}\n: 1\n", "line 1: a key is a list or a mapping of its own"),
        ("a: [1\n", "line 2 is no YAML: "),
        ("a: 1\n\tb: 2\n", "line 2 is no YAML: "),
        ("a: *x\n", "line 1 is no YAML: found undefined alias"),
        ("a: !x 1\n", "line 1 is no YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "line 2 is no YAML: "),
        ("a: 2026-13-45\n", "is no YAML: month must be in 1..12"),
        ("a: \x07\n", "is no YAML: "),
        ("a: " + "[" * 5000, "is nested too deeply"),
        ('m: {x: {env: {A: "b\\0c"}}}\n', "m.x.env.A: there is a NUL character"),
        ('m:\n  command: [python, "b\\0c"]\n', "m.command.1: there is a NUL character"),
        ('m: {"a\\0": 1}\n', "m.a\\0: there is a NUL character"),
    ],
)
def test_one_line_says_where(tmp_path: Path, content: str, why: str) -> None:
    file = tmp_path / "zerowake.yaml"
    file.write_text(content)
    with pytest.raises(BadFile) as refused:
        read_yaml(file)
    said = str(refused.value)
    assert said.startswith(str(file)) and why in said and "\n" not in said


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=f"{tmp_path} cannot be read: Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "latin").write_bytes("a: \xe9\n".encode("latin-1"))
    with pytest.raises(BadFile, match="is no text in UTF-8"):
        read_yaml(tmp_path / "latin")


def test_what_is_meant_is_read(tmp_path: Path) -> None:
    file = tmp_path / "zerowake.yaml"
    file.write_text('base: &b {x: 1, y: 2}\nm:\n  <<: *b\n  y: 3\n"no": {"1": "0x10"}\nself: &s [*s]\n')
    found = read_yaml(file)
    assert (found["m"], found["no"]) == ({"x": 1, "y": 3}, {"1": "0x10"})


@pytest.mark.parametrize(
    ("place", "line"),
    [
        (("models", "chat", "port"), 3),
        (("models", "chat", "sources", 1, "redis", "url"), 7),
        (("models", "chat", "sources", 2, "url"), 4),
        (("models", "chat", "command"), 2),
        (("models", "chat", "shared", "x"), 8),
        ((), 0),
        (("missing",), 0),
    ],
    ids=["a value", "in a list, and of a kind", "past its end", "is missing", "in what is merged", "all of it", "at the top"],
)
def test_the_line_of_a_value(tmp_path: Path, place: tuple[int | str, ...], line: int) -> None:
    file = tmp_path / "zerowake.yaml"
    content = "models:\n  chat:\n    port: x\n    sources:\n    - type: cron\n    - type: redis\n      url: 5\n    shared: {<<: {x: 1}}\n"
    file.write_text(content)
    assert lines_of(file, [place]) == [line]
    file.write_text("models: [")
    assert lines_of(file, [place]) == [0]
    assert lines_of(tmp_path, [place]) == [0]
