"""The node's memory, as the kernel tells it."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int:
    """Bytes that programs may still take without swapping."""
    return _meminfo("MemAvailable")


def total_memory() -> int:
    return _meminfo("MemTotal")


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/meminfo has no {key}")
