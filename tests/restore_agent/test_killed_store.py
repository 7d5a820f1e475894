"""A node's store whose agent is killed at any write: what is named is whole, and what is not is gone at the next start."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.page_runs import PAGE
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import publish

_WRITES = "fsync", "mkdir", "rename", "replace", "rmdir", "symlink", "unlink"
_SHARED, _OTHER, _NEW = (bytes([number]) * PAGE for number in (1, 2, 3))


class _Killed(BaseException):
    """Nothing catches it, and nothing is written after it."""


@contextlib.contextmanager
def _killed_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The agent does not do that write of the block, nor any after it. Yields those that it did."""
    done: list[str] = []

    def counted(name: str, write: Callable[..., Any]) -> Callable[..., Any]:
        def writes(*arguments: Any, **options: Any) -> Any:
            if len(done) >= number:
                raise _Killed
            done.append(name)
            return write(*arguments, **options)

        return writes

    with monkeypatch.context() as patch:
        for name in _WRITES:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        with contextlib.suppress(_Killed):
            yield done


def _replace(store: Store) -> None:
    publish(store, _NEW, "one", replace=True)


def _again(store: Store) -> None:
    publish(store, _SHARED, "one", replace=True)


def _remove(store: Store) -> None:
    store.remove("default", "two")


def _arrive(store: Store) -> None:
    store.arrivals.begin("ab" * 32, b"of no version")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with two snapshots that share a chunk, and a third that does not."""
    state = tmp_path_factory.mktemp("two") / "state"
    with contextlib.closing(Store(state)) as store:
        publish(store, _SHARED, "one")
        publish(store, _SHARED, "two")
        publish(store, _OTHER, "three")
    return state


@pytest.mark.parametrize("change", [_replace, _again, _remove, _arrive], ids=lambda change: change.__name__.strip("_"))
def test_killed_at_any_write_what_is_named_is_whole_and_nothing_else_is_left(
    change: Callable[[Store], None], two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in itertools.count():
        state = tmp_path / str(number)
        shutil.copytree(two, state, symlinks=True)
        with contextlib.closing(Store(state)) as store, _killed_at(number, monkeypatch) as done:
            change(store)
        _look(state, {"one", "two", "three"} - ({"two"} if change is _remove else set()))
        shutil.rmtree(state)
        if len(done) < number:
            assert number > 3, "it has writes"
            return


def _look(state: Path, there: set[str]) -> None:
    """At what the next agent finds."""
    with contextlib.closing(Store(state)) as store:
        found = store.list()
        for each in found:
            assert isinstance(each, Snapshot), each
            store.verify(each)
        snapshots = [each for each in found if isinstance(each, Snapshot)]
        assert {each.manifest.name for each in snapshots} >= there
        assert {path.name for path in (state / "chunks").glob("*/*")} == {chunk.hash for each in snapshots for chunk in each.chunks}
        assert {path.name for path in (state / "snapshots").iterdir()} == {each.digest for each in snapshots}
        assert list((state / "tmp").iterdir()) == []
