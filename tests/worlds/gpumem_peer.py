"""A process that uses gpumem step by step, printing a line after each and waiting for one on stdin, so that a test can kill it there.

python -m tests.worlds.gpumem_peer SOCKET read ID [CAPABILITY]
                                   write ID SIZE
                                   scratch SIZE BYTE
                                   wait ID
"""

from __future__ import annotations

import sys
from pathlib import Path

from zerowake_proto import gpumem_pb2 as pb

from gpumem.client import Client


def step(*words: object) -> None:
    print(*words, flush=True)
    sys.stdin.readline()


def main() -> None:
    socket, what, first, *rest = sys.argv[1:]
    with Client(Path(socket), label=f"peer that {what}s") as client:
        step("connected")
        match what:
            case "read":
                region = client.attach(bytes.fromhex(first), bytes.fromhex(rest[0]) if rest else b"")
                step("attached", region.view()[:16].hex())
                client.quiesce()
                step("quiesced")
                client.resume()
                step("resumed", region.view()[:16].hex())
            case "write":
                region = client.begin(bytes.fromhex(first), pb.Layout(size=int(rest[0])))
                step("begun", region.capability.hex())
                view = region.view()
                view[: len(view) // 2] = b"w" * (len(view) // 2)
                step("half written")
                view[len(view) // 2 :] = b"w" * (len(view) - len(view) // 2)
                step("written")
                region.seal()
                step("sealed")
            case "scratch":
                scratch = client.scratch(int(first))
                found = scratch.view()
                dirty = bytes(found).strip(b"\0")[:16]
                step("lent", dirty.hex() or "clean")
                found[:] = bytes([int(rest[0])]) * len(found)
                step("written")
                client.quiesce()  # ends the lease, with the process alive
                step("quiesced")
            case "wait":
                client.attach(bytes.fromhex(first), wait=60)
                step("attached")


if __name__ == "__main__":
    main()
