"""Who borrows exclusive memory of gpumem, again and again, and writes down what it got: a process that may be killed at any time.

    python -m tests.chaos.borrowers SOCKET JOURNAL NAME

Each piece has a name that two owners would have in common: the inode of its descriptor. It is to be zeros when it comes, and to keep what
its owner has written until it is given back. A line is written after it came, and one before it goes.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from pathlib import Path

from gpumem.client import Client
from gpumem.wire.errors import GpumemError
from tests.chaos.journal import append

_SIZES = (1 << 20, 3 << 20, 8 << 20)


def inodes() -> dict[str, str]:
    """Of this process's mappings of lent memory: address and inode."""
    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split()
        if len(words) > 5 and "memfd:" in words[5]:
            found[words[0]] = words[4]
    return found


def main() -> None:
    socket, journal, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    chance = random.Random(name)
    append(journal, what="began", borrower=name, pid=os.getpid())
    while os.getppid() != 1:
        try:
            with Client(socket, device="host", label=name) as client:
                for _ in range(chance.randrange(1, 20)):
                    borrow(client, journal, name, chance)
        except (GpumemError, OSError) as error:
            append(journal, what="refused", borrower=name, why=f"{type(error).__name__}: {error}"[:200])
            time.sleep(0.2)


def borrow(client: Client, journal: Path, name: str, chance: random.Random) -> None:
    before = set(inodes().items())
    scratch = client.scratch(chance.choice(_SIZES))
    pieces = sorted(inode for address, inode in set(inodes().items()) - before)
    view = scratch.view()
    dirty = bytes(view[:]) != bytes(view.nbytes)
    mark = chance.randbytes(4096)
    view[:4096] = mark
    append(journal, what="got", borrower=name, pid=os.getpid(), pieces=pieces, dirty=dirty)
    time.sleep(chance.uniform(0.01, 0.6))
    kept = bytes(view[:4096]) == mark
    append(journal, what="gives", borrower=name, pid=os.getpid(), pieces=pieces, kept=kept)
    view.release()
    scratch.close()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
