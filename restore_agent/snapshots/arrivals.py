"""Snapshots that are on their way onto this node's disk: what has come of them outlives the agent, so that the next try fetches the rest.

    arriving/<digest>.json     the manifest: whose chunks are not swept away
    arriving/<digest>/         what will be the snapshot's folder

One that nobody has gone on with for a day is given up, by the next sweep. Rejected: leases on disk, which would need an owner; here age
alone decides, and a pull that goes on after that only fetches more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Container
from pathlib import Path

from restore_agent.snapshots.manifest import InvalidManifest, Manifest
from zerowake_shared import durable
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.discard import discard

_GIVEN_UP = 24 * 3600.0  # seconds


class Arrivals:
    """Those of one state folder. Its calls block on the disk."""

    def __init__(self, state: Path, clock: Clock = SYSTEM_CLOCK) -> None:
        self._folder = state / "arriving"
        self._clock = clock

    def begin(self, digest: str, manifest: bytes) -> Path:
        """The folder for its files, with what has come before; from now on its chunks are kept. `manifest`: verified. Raises OSError."""
        folder = self._folder / digest
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        durable.replace(self._file(digest), manifest)  # first: a folder without it is nobody's
        now = self._clock.wall()
        os.utime(self._file(digest), (now, now))
        folder.mkdir(exist_ok=True, mode=0o700)
        return folder

    def ended(self, digest: str) -> None:
        """Its folder has become the snapshot's."""
        self._file(digest).unlink(missing_ok=True)

    def kept(
        self,
        leased: Container[str] = (),
        named: Container[str] = (),
        remove: Callable[[Path, str], None] = lambda folder, _: discard(folder),
    ) -> tuple[set[str], set[str]]:
        """The chunks and the regions of weights that are kept for those on their way; what was given up is removed.

        `leased`: digests that somebody brings now. `named`: those that are here. `remove`: takes the folder of a digest away.
        """
        chunks: set[str] = set()
        regions: set[str] = set()
        for file in self._folder.glob("*.json"):
            folder, digest = file.with_suffix(""), file.stem
            with contextlib.suppress(FileNotFoundError):  # it has arrived meanwhile
                if digest not in leased and (self._is_old(file) or (digest in named and not folder.exists())):
                    remove(folder, digest)
                    file.unlink()
                    continue
                with contextlib.suppress(InvalidManifest):  # of another version of zerowake: nobody goes on with it
                    manifest = Manifest.decode(file.read_bytes())
                    chunks |= {chunk.hash for chunk in manifest.chunks}
                    regions |= {record.region for record in manifest.weights}
        for path in self._folder.iterdir() if self._folder.exists() else ():
            if path.is_dir():
                if not self._file(path.name).exists():
                    remove(path, path.name)
            elif path.name.startswith("."):  # an agent was killed as it wrote it
                with contextlib.suppress(FileNotFoundError):
                    if self._is_old(path):
                        path.unlink()
        return chunks, regions

    def _is_old(self, path: Path) -> bool:
        return self._clock.wall() - path.stat().st_mtime > _GIVEN_UP

    def _file(self, digest: str) -> Path:
        return self._folder / f"{digest}.json"
