"""The small disk of a machine of the fault run: it is full when it is full, and as slow as it is made."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.disk import BYTES, mounted, throttle

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for mounts")
_RATE, _SIZE = 1_000_000, 400_000


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    mounted(tmp_path / "state")
    yield tmp_path / "state"
    subprocess.run(["umount", "--lazy", tmp_path / "state"], check=True)


def written(folder: Path) -> float:
    """Seconds that some bytes take to the disk."""
    with (folder / "file").open("wb") as file:
        file.write(os.urandom(_SIZE))
        file.flush()
        began = time.monotonic()
        os.fsync(file.fileno())
        return time.monotonic() - began


def test_it_is_as_slow_as_it_is_made(folder: Path) -> None:
    assert not list(folder.iterdir())
    throttle(folder, _RATE)
    assert written(folder) > 0.5 * _SIZE / _RATE
    throttle(folder, 0)
    written(folder)


def test_it_has_an_end(folder: Path) -> None:
    with (folder / "file").open("wb") as file, pytest.raises(OSError) as raised:
        os.posix_fallocate(file.fileno(), 0, BYTES)
    assert raised.value.errno == errno.ENOSPC
