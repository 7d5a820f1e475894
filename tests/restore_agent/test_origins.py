"""Which stores a node's snapshots are known to stand in."""

from __future__ import annotations

from pathlib import Path

from restore_agent.snapshots.origins import Origins


def test_stores_are_known_to_the_next_agent_for_as_long_as_the_snapshot_is_there(tmp_path: Path) -> None:
    for digest in ("a", "b"):
        (tmp_path / "snapshots" / digest).mkdir(parents=True)
    origins = Origins(tmp_path)
    assert origins.of("a") == []
    origins.add("a", ["s3://b/one", "file:///two"])
    origins.add("a", ["file:///two", "file:///three"])
    origins.add("b", ["s3://b/one"])
    origins.add("b", [])
    assert Origins(tmp_path).of("a") == ["s3://b/one", "file:///two", "file:///three"]
    origins.forget("b")
    origins.forget("b")
    assert origins.of("b") == []
    (tmp_path / "snapshots/a").rmdir()
    assert Origins(tmp_path).of("a") == []


def test_what_cannot_be_read_or_written_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "node/stores").mkdir(parents=True)
    (tmp_path / "snapshots/torn").mkdir(parents=True)
    (tmp_path / "node/stores/torn").write_bytes(b"\xff\xfe")
    origins = Origins(tmp_path)
    assert origins.of("torn") == []
    origins._folder = tmp_path / "node/stores/torn"
    origins.add("other", ["s3://b/one"])
    assert origins.of("other") == []
