"""Small files: whole, or as they were before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zerowake_shared import durable


def test_what_is_written_is_there_with_its_mode_from_the_beginning(tmp_path: Path) -> None:
    durable.write(tmp_path / "key", b"secret", 0o600)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert durable.content(tmp_path / "key") == b"secret"
    with pytest.raises(FileExistsError):
        durable.write(tmp_path / "key", b"other")
    durable.replace(tmp_path / "key", b"other")
    assert durable.content(tmp_path / "key") == b"other"
    assert durable.content(tmp_path / "nothing") is None


def test_a_disk_that_refuses_leaves_the_old_content_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable.replace(tmp_path / "file", b"old")

    def full(fd: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        durable.replace(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]
