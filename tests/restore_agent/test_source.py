"""Small objects of any source: read whole, and refused where somebody put something large in their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from restore_agent.transfer.directory import Directory
from restore_agent.transfer.source import Absent, Altered, read_whole


async def test_a_small_object_is_read_whole_and_a_large_one_is_refused(tmp_path: Path) -> None:
    store = Directory(tmp_path)
    await store.put("names/a/b.json", b"twelve bytes")
    assert await read_whole(store, "names/a/b.json", 12) == b"twelve bytes"
    with pytest.raises(Altered, match=r"names/a/b\.json of file://.* has more than the 11 bytes"):
        await read_whole(store, "names/a/b.json", 11)
    with pytest.raises(Absent):
        await read_whole(store, "names/a/c.json", 11)
    await store.close()
