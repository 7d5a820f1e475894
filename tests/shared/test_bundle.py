"""A bug report is whole but for what could not be had, and is its owner's alone."""

from __future__ import annotations

import json
import tarfile
import threading
from pathlib import Path

import pytest

from zerowake_shared.bundle import Part, Parts, end_of, gathered, write
from zerowake_shared.checkup import Subject
from zerowake_shared.secrets_left_out import LEFT_OUT, Scrubber

SUBJECT = Subject(Path("/nowhere"), Path("/nowhere"))


async def test_a_part_that_hangs_or_fails_leaves_a_line() -> None:
    go = threading.Event()

    def hangs(_: Subject) -> Parts:
        go.wait()
        return {}

    def fails(_: Subject) -> Parts:
        raise PermissionError(13, "Permission denied", "/etc/shadow")

    async def whole(_: Subject) -> Parts:
        return {"a.txt": "text", "b.json": {"x": 1}}

    try:
        found, missing = await gathered([Part("stuck", hangs, 0.1), Part("shadow", fails), Part("whole", whole)], SUBJECT)
    finally:
        go.set()
    assert found == {"a.txt": "text", "b.json": {"x": 1}}
    assert missing == ["stuck: no answer within 0 s", "shadow: /etc/shadow: Permission denied"]


def test_what_one_file_names_as_secret_is_in_none(tmp_path: Path) -> None:
    path = tmp_path / "report.tar.gz"
    found = {"z.json": {"env": {"A": "planted-Secret-1"}}, "a.log": "the engine prints planted-Secret-1", "b.json": ["planted-Secret-1"]}
    assert [name for name, _ in write(path, found, Scrubber())] == ["a.log", "b.json", "z.json"]
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as archive:
        texts = {name: archive.extractfile(name).read().decode() for name in archive.getnames()}  # type: ignore[union-attr]
    assert texts.pop("report/a.log") == f"the engine prints {LEFT_OUT}"
    assert {name: json.loads(text) for name, text in texts.items()} == {
        "report/b.json": [LEFT_OUT],
        "report/z.json": {"env": {"A": LEFT_OUT}},
    }


def test_nothing_that_is_there_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "report.tar.gz"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        write(path, {}, Scrubber())
    assert path.read_text() == "mine"


def test_of_a_long_text_its_end_is_taken(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("0123456789")
    assert [end_of(tmp_path / "log", most) for most in (4, 100)] == ["6789", "0123456789"]
