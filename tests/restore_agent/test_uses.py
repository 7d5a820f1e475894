"""How often a snapshot was used of late: it fades, and outlives the agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from restore_agent.snapshots.uses import Uses

DAY = 24 * 3600.0


class Wall:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.time = 1e9

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time


def test_a_use_counts_half_after_a_day(tmp_path: Path) -> None:
    clock = Wall()
    uses = Uses(tmp_path / "uses", clock)
    assert uses.of("d") == 0.0
    uses.used("d")
    uses.used("d")
    assert uses.of("d") == pytest.approx(2.0)
    clock.time += DAY
    assert uses.of("d") == pytest.approx(1.0)
    uses.used("d")
    assert uses.of("d") == pytest.approx(2.0)
    clock.time -= 10 * DAY
    assert uses.of("d") == pytest.approx(2.0), "a clock that was set back makes none of them more"


def test_what_was_kept_is_known_to_the_next_agent_for_a_month(tmp_path: Path) -> None:
    clock = Wall()
    uses = Uses(tmp_path / "node" / "uses", clock)
    for digest in ("kept", "old", "torn", "only known here"):
        uses.used(digest)
    for digest in ("kept", "old", "torn"):
        uses.keep(digest)
    clock.time += 20 * DAY
    uses.used("kept")
    uses.keep("kept")
    (tmp_path / "node" / "uses" / "torn").write_text("1.")
    clock.time += 15 * DAY
    again = Uses(tmp_path / "node" / "uses", clock)
    assert again.of("kept") == pytest.approx(uses.of("kept")) != 0.0
    assert [again.of(digest) for digest in ("old", "torn", "only known here")] == [0.0, 0.0, 0.0]
    assert [path.name for path in (tmp_path / "node" / "uses").iterdir()] == ["kept"]


def test_the_first_time_that_it_is_wanted_counts_and_no_other(tmp_path: Path) -> None:
    clock = Wall()
    uses = Uses(tmp_path / "uses", clock)
    assert uses.wanted("d")
    assert uses.of("d") == 1.0
    clock.time += 9 * DAY
    assert not uses.wanted("d")
    assert uses.of("d") < 0.01


def test_a_disk_that_refuses_is_nobodys_trouble(tmp_path: Path) -> None:
    (tmp_path / "uses").write_text("no folder")
    uses = Uses(tmp_path / "none", Wall())
    uses.used("d")
    uses._folder = tmp_path / "uses"
    uses.keep("d")
    assert uses.of("d") == 1.0
