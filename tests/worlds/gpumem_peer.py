"""A process that uses gpumem step by step, printing a line after each and waiting for one on stdin, so that a test can kill it there.

python -m tests.worlds.gpumem_peer SOCKET read ID [CAPABILITY]
                                   write ID SIZE
                                   scratch SIZE BYTE
                                   wait ID
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zerowake_proto import gpumem_pb2 as pb

from gpumem.client import Client


@contextmanager
def peer(socket: Path, *words: str | Path | bytes) -> Iterator[subprocess.Popen[str]]:
    """The other end: the process, which does what the words say until it is killed. Use `step` and `go_on`."""
    texts = [word.hex() if isinstance(word, bytes) else str(word) for word in words]
    command = [sys.executable, "-m", "tests.worlds.gpumem_peer", str(socket), *texts]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def step(process: subprocess.Popen[str]) -> str:
    """Waits for the process's next line."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, f"the process ended with {process.wait()}"
    return line


def go_on(process: subprocess.Popen[str]) -> str:
    """Lets the process do its next step, and waits for the line."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return step(process)


def did(*words: object) -> None:
    print(*words, flush=True)
    sys.stdin.readline()


def main() -> None:
    socket, what, first, *rest = sys.argv[1:]
    with Client(Path(socket), label=f"peer that {what}s") as client:
        did("connected")
        match what:
            case "read":
                region = client.attach(bytes.fromhex(first), bytes.fromhex(rest[0]) if rest else b"")
                did("attached", region.view()[:16].hex())
                client.quiesce()
                did("quiesced")
                client.resume()
                did("resumed", region.view()[:16].hex())
            case "write":
                region = client.begin(bytes.fromhex(first), pb.Layout(size=int(rest[0])))
                did("begun", region.capability.hex())
                view = region.view()
                view[: len(view) // 2] = b"w" * (len(view) // 2)
                did("half written")
                view[len(view) // 2 :] = b"w" * (len(view) - len(view) // 2)
                did("written")
                region.seal()
                did("sealed")
            case "scratch":
                scratch = client.scratch(int(first))
                found = scratch.view()
                dirty = bytes(found).strip(b"\0")[:16]
                did("lent", dirty.hex() or "clean")
                found[:] = bytes([int(rest[0])]) * len(found)
                did("written")
                client.quiesce()  # ends the lease, with the process alive
                did("quiesced")
            case "wait":
                client.attach(bytes.fromhex(first), wait=60)
                did("attached")


if __name__ == "__main__":
    main()
