"""A thread with a container user's rights over files, and its own again afterwards."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from restore_agent.places.acting_as import User, acting_as

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
SOMEBODY = User(4711, 4712)


def test_what_is_written_is_theirs_and_nothing_else_is_reached(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for path in (tmp_path, *list(tmp_path.parents)[:-2]):
        path.chmod(path.stat().st_mode | 0o111)
    for folder in (theirs, ours):
        folder.mkdir(mode=0o700)
    theirs.chmod(0o777)
    with acting_as(SOMEBODY):
        (theirs / "new").mkdir()
        (theirs / "new/file").write_text("x")
        with pytest.raises(PermissionError):
            (ours / "file").write_text("x")
        with acting_as(User(0, 0)):
            (ours / "file").write_text("again ours")
        with pytest.raises(PermissionError):
            (ours / "file").read_text()
    assert {((theirs / name).stat().st_uid, (theirs / name).stat().st_gid) for name in ("new", "new/file")} == {(4711, 4712)}
    assert (ours / "file").read_text() == "again ours"


def test_it_ends_with_the_block_whatever_ends_that(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of the block"), acting_as(SOMEBODY):
        raise ValueError("of the block")
    (tmp_path / "file").write_text("x")
    assert (tmp_path / "file").stat().st_uid == 0


def test_other_threads_are_who_they_were(tmp_path: Path) -> None:
    begun, within = threading.Event(), threading.Event()

    def write() -> None:
        begun.set()
        within.wait()
        (tmp_path / "file").write_text("x")

    thread = threading.Thread(target=write)
    thread.start()
    begun.wait()
    with acting_as(SOMEBODY):
        within.set()
        thread.join()
    assert (tmp_path / "file").stat().st_uid == 0
