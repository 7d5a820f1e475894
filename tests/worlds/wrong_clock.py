"""A clock that is wrong for the programs that are under it, and for them alone: all of them at once, as its file says."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path


class WrongClock:
    """Right at first. Its files are in that folder."""

    def __init__(self, folder: Path) -> None:
        self._file, self._library = folder / "clock", folder / "wrong_clock.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", self._library, source], check=True)
        self._file.write_bytes(bytes(8))

    @property
    def env(self) -> dict[str, str]:
        """Of a program that is to be under it."""
        return {"LD_PRELOAD": str(self._library), "ZEROWAKE_WRONG_CLOCK": str(self._file)}

    def jump(self, seconds: int) -> None:
        """So far is it from the machine's from now on."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("q", seconds))
