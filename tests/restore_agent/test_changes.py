"""Who listens hears of every change since, each for itself."""

from __future__ import annotations

from pathlib import Path

from restore_agent.sequences.changes import Changes, Removed
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import publish


def test_each_listener_hears_what_came_since_it_listens(tmp_path: Path) -> None:
    snapshot, changes = publish(Store(tmp_path), b"x" * 8192), Changes()
    first, second, third = snapshot, Removed(snapshot), Removed(snapshot)
    changes.tell(first)
    with changes.heard() as one:
        changes.tell(second)
        with changes.heard() as other:
            changes.tell(third)
        changes.tell(first)
    changes.tell(second)
    assert [one.get_nowait() for _ in range(one.qsize())] == [second, third, first]
    assert [other.get_nowait() for _ in range(other.qsize())] == [third]


def test_words_are_numbered_in_the_order_in_which_they_are_said() -> None:
    changes = Changes()
    assert changes.revision() < changes.revision() < changes.revision()
