"""Snapshots that are on their way onto this node's disk: what has come of them outlives the agent, so that the next try fetches the rest.

    arriving/<digest>.json     the manifest: whose chunks are not swept away
    arriving/<digest>/         what will be the snapshot's folder

One that nobody has gone on with for a day is given up, by the next sweep. Rejected: leases on disk, which would need an owner; here age
alone decides, and a pull that goes on after that only fetches more.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from restore_agent.snapshots import durable
from restore_agent.snapshots.manifest import InvalidManifest, Manifest
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_GIVEN_UP = 24 * 3600.0  # seconds


class Arrivals:
    """Those of one state folder. Its calls block on the disk."""

    def __init__(self, state: Path, clock: Clock = SYSTEM_CLOCK) -> None:
        self._folder = state / "arriving"
        self._clock = clock

    def begin(self, digest: str, manifest: bytes) -> Path:
        """The folder for its files, with what has come before; from now on its chunks are kept. `manifest`: verified. Raises OSError."""
        folder = self._folder / digest
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        durable.replace(self._file(digest), manifest)
        now = self._clock.wall()
        os.utime(self._file(digest), (now, now))
        return folder

    def ended(self, digest: str) -> None:
        """Its folder has become the snapshot's."""
        self._file(digest).unlink(missing_ok=True)

    def kept(self) -> tuple[set[str], set[str]]:
        """The chunks and the regions of weights that are kept for those on their way; what was given up is removed."""
        chunks: set[str] = set()
        regions: set[str] = set()
        for file in self._folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # it has arrived meanwhile
                if self._clock.wall() - file.stat().st_mtime > _GIVEN_UP:
                    shutil.rmtree(file.with_suffix(""), ignore_errors=True)
                    file.unlink()
                    continue
                with contextlib.suppress(InvalidManifest):  # of another version of zerowake: nobody goes on with it
                    manifest = Manifest.decode(file.read_bytes())
                    chunks |= {chunk.hash for chunk in manifest.chunks}
                    regions |= {record.region for record in manifest.weights}
        return chunks, regions

    def _file(self, digest: str) -> Path:
        return self._folder / f"{digest}.json"
