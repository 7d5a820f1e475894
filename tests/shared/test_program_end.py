"""A program ends with its own exit code while a library's thread is running Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

# obstore's thread calls the loop to hand in what was asked for. Here it stays in that call, and takes and lets go of the interpreter.
PROGRAM = """
import asyncio, atexit, sys, time
from zerowake_shared.program_end import ends_at_once

class Held(asyncio.SelectorEventLoop):
    def call_soon_threadsafe(self, *asked, **context):
        super().call_soon_threadsafe(*asked, **context)
        while True:
            time.sleep(0)

async def asks():
    import obstore
    from obstore.store import MemoryStore
    store = MemoryStore()
    obstore.put(store, "key", b"value")
    return bytes(await (await obstore.get_async(store, "key")).bytes_async())

with ends_at_once("asks"):
    atexit.register(print, "what was registered")
    loop = Held()
    print(loop.run_until_complete(asks()))
    ENDS
"""


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [("", 0, ""), ("sys.exit()", 0, ""), ("sys.exit(3)", 3, ""), ("sys.exit('why')", 1, "why"), ("1 / 0", 1, "ZeroDivisionError")],
)
def test_it_ends_as_it_says(ends: str, code: int, said: str) -> None:
    done = _run(ends)
    assert (done.returncode, done.stdout.splitlines()) == (code, ["b'value'", "what was registered"]), done
    assert said in done.stderr if said else not done.stderr


def test_output_that_finds_no_room_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with Path("/dev/full").open("w") as full:
        done = _run("", stdout=full)
    assert (done.returncode, done.stderr) == (1, "asks: its last output could not be written: [Errno 28] No space left on device\n")


def _run(ends: str, stdout: IO[str] | int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.replace("ENDS", ends)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
