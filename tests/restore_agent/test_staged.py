"""What is known of an image while it comes, and what those who wait for it are told when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from restore_agent.pages.fill import Arena
from restore_agent.sequences.staged import Staged
from restore_agent.snapshots.chunks import Chunk
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import publish


async def test_what_is_still_to_come_is_what_was_not_read_yet(store: Store, tmp_path: Path) -> None:
    snapshot = publish(store, bytes(9 << 20))
    staged = Staged(snapshot, tmp_path / "images")
    assert (staged.size, staged.bytes_to_come, staged.is_coming) == (9 << 20, 9 << 20, True)
    arena = Arena(snapshot.chunks, store.read_file(snapshot, "pages.index", snapshot.manifest.files["pages.index"]))
    staged.arriving.set_result(arena)
    left: list[int] = []

    def read(chunk: Chunk, target: memoryview) -> None:
        left.append(staged.bytes_to_come)

    await arena.read(read)
    assert left[0] == 9 << 20
    staged.arena.set_result(arena)
    assert (staged.bytes_to_come, staged.is_coming) == (0, False)


async def test_whoever_waits_for_what_has_not_come_gets_the_error(store: Store, tmp_path: Path) -> None:
    staged = Staged(publish(store, bytes(4096)), tmp_path / "images")
    staged.skeleton.set_result(tmp_path)
    staged.fail(OSError("no disk"))
    staged.fail(OSError("twice"))
    assert await staged.skeleton == tmp_path
    for future in (staged.arriving, staged.arena):
        with pytest.raises(OSError, match="no disk"):
            await future
    assert staged.bytes_to_come == 4096
