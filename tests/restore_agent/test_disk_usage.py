"""What files take of a disk, as the kernel counts it."""

from __future__ import annotations

import os
from pathlib import Path

from restore_agent.snapshots.disk_usage import bytes_below


def test_all_below_a_folder_counts_by_what_it_takes(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/one").write_bytes(os.urandom(100_000))
    (tmp_path / "a/b/other").write_bytes(os.urandom(50_000))
    with (tmp_path / "hole").open("wb") as hole:
        hole.truncate(1 << 30)
    (tmp_path / "away").symlink_to("/usr")
    assert 150_000 <= bytes_below(tmp_path) < 200_000
    assert bytes_below(tmp_path / "none") == 0
