"""A small disk of its own: a file as a block device, which the kernel can make slow for whoever reads or writes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

BYTES = 384 << 20
_NOT_LATER = "lazy_itable_init=0,lazy_journal_init=0"  # the kernel else goes on with the making of it


def mounted(folder: Path) -> None:
    """Comes into being, at that folder, and is gone once it is unmounted."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.with_name(f"{folder.name}.disk")
    file.touch()
    os.truncate(file, BYTES)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-E", _NOT_LATER, file], check=True)
        subprocess.run(["mount", "-o", "loop", file, folder], check=True)
    finally:
        file.unlink()  # the mount has it
    (folder / "lost+found").rmdir()


def throttle(folder: Path, rate: int) -> None:
    """From now on it has so many bytes a second each way; 0: all. A rule of the root's group is one for everybody."""
    device = folder.stat().st_dev
    for way in ("read", "write"):
        file = Path(f"/sys/fs/cgroup/blkio/blkio.throttle.{way}_bps_device")
        file.write_text(f"{os.major(device)}:{os.minor(device)} {rate}")
