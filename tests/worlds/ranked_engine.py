"""A model server of several ranks, each a process with weights of its own, that sum up over memory that they share.

`python -m tests.worlds.ranked_engine PORT WEIGHTS RANKS KERNEL`. WEIGHTS has a checkpoint directory `rank-N` for each, with kept readings;
KERNEL is the library of collective_on_processor.py.

It is made as vLLM's tensor parallel engines are: the first process serves and tells the ranks what to do; they share a file of /dev/shm
that has a name (vLLM's ring of messages), one whose name is gone (NCCL's segments), and memory lent by gpumem, in which the adapter's
kernel sums and gathers by launches that were captured once; and when a rank dies, all of it ends. `/sum` has what each rank has found by
each way: the digest of all the ranks' digests, and of the sum of their last weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import secrets
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from gpumem.checkpoint.safetensors import kept_reading
from gpumem.client import Client
from restore_agent.workload.control_directory import ControlDirectory
from restore_agent.workload.vllm.peer_memory import Collectives, PeerMemory
from tests.worlds.collective_on_processor import Graph, Processor
from tests.worlds.json_answers import json_server

RING, SEGMENT = 640 << 20, 1 << 20  # bytes of the file that has a name, nearly all of it a hole, and of the one that has none
SLOT = 64  # bytes of it for each rank: the round that it has come to, and its digest
PATIENCE = 20.0
DIGEST, SUMMED = 32, 4096  # bytes


class Board:
    """What ranks put down for each other, at the end of a file that they share."""

    def __init__(self, path: Path, rank: int, ranks: int) -> None:
        with path.open("r+b") as file:
            whole = memoryview(mmap.mmap(file.fileno(), 0))
        self._memory, self._rank, self._ranks = whole[-ranks * SLOT :], rank, ranks
        self._round = 0

    def exchanged(self, digest: bytes) -> list[bytes]:
        """Every rank's, once all have come here as often as this one."""
        self._round += 1
        self._memory[self._rank * SLOT + 8 : self._rank * SLOT + 40] = digest
        struct.pack_into("<Q", self._memory, self._rank * SLOT, self._round)
        deadline = time.monotonic() + PATIENCE
        while min(struct.unpack_from("<Q", self._memory, each * SLOT)[0] for each in range(self._ranks)) < self._round:
            if time.monotonic() > deadline:
                raise TimeoutError("a rank does not come")
            time.sleep(0.001)
        return [bytes(self._memory[each * SLOT + 8 : each * SLOT + 40]) for each in range(self._ranks)]


class Captured:
    """A gather of the ranks' digests and a sum of their last weights, over memory that gpumem lends."""

    def __init__(self, client: Client, number: int, ranks: int, library: Path) -> None:
        memory = PeerMemory(client, number)
        memory.join([client.device] * ranks)
        self._graph = Graph(Processor(library))
        collectives = Collectives(memory.addresses, number, self._graph.capture)
        self._digest, self._digests = ctypes.create_string_buffer(DIGEST), ctypes.create_string_buffer(DIGEST * ranks)
        self._part, self._total = ctypes.create_string_buffer(SUMMED), ctypes.create_string_buffer(SUMMED)
        assert collectives.gather(ctypes.addressof(self._digest), ctypes.addressof(self._digests), DIGEST)
        assert collectives.sum(ctypes.addressof(self._part), ctypes.addressof(self._total), SUMMED, "bfloat16")

    def replay(self, digest: bytes, part: bytes) -> tuple[bytes, bytes]:
        self._digest.raw, self._part.raw = digest, part
        self._graph.replay()
        return self._digests.raw, self._total.raw


def rank_main(number: int, ranks: int, weights: Path, named: Path, nameless: Path, library: Path, meeting: str) -> None:
    found = kept_reading(weights)
    assert found
    client = Client(label=f"rank {number}")
    lent = client.attach(client.fill(found.layout, found.parts).id)
    client.meet(meeting.encode())
    captured = Captured(client, number, ranks, library)
    boards = [Board(path, number, ranks) for path in (named, nameless)]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    answers.write(json.dumps(client.device) + "\n")
    for line in sys.stdin:
        order = json.loads(line)
        said: Any = None
        if order == "sum":
            digest = hashlib.sha256(lent.view()).digest()
            everyone = {b"".join(board.exchanged(digest)) for board in boards}
            gathered, total = captured.replay(digest, bytes(lent.view()[-SUMMED:]))
            said = {
                "digests": [hashlib.sha256(each).hexdigest() for each in {*everyone, gathered}],
                "total": hashlib.sha256(total).hexdigest(),
            }
        elif order == "quiesce":
            client.quiesce()
        else:
            client.resume(moved=order["moved"], meeting=order["meeting"].encode())
        answers.write(json.dumps(said) + "\n")


class Ranks:
    """The ranks, as the first process has them."""

    def __init__(self, weights: Path, count: int, library: Path) -> None:
        self._files = [Path(f"/dev/shm/{name}-{os.getpid()}") for name in ("ring", "segment")]
        for path, size in zip(self._files, (RING, SEGMENT), strict=True):
            path.touch()
            os.truncate(path, size)
        module = [sys.executable, "-m", "tests.worlds.ranked_engine", "rank"]
        meeting = secrets.token_hex(32)
        self.directories = [weights / f"rank-{number}" for number in range(count)]
        self._all = [
            subprocess.Popen(
                [*module, str(number), str(count), str(directory), *map(str, self._files), str(library), meeting],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number, directory in enumerate(self.directories)
        ]
        self.devices = self._answers()
        self._files[1].unlink()
        for rank in self._all:
            threading.Thread(target=self._ends_with, args=(rank,), daemon=True).start()

    def ask(self, order: object) -> list[Any]:
        for rank in self._all:
            assert rank.stdin
            with contextlib.suppress(BrokenPipeError):  # it has ended, and so does all of it
                rank.stdin.write(json.dumps(order) + "\n")
                rank.stdin.flush()
        return self._answers()

    def _answers(self) -> list[Any]:
        lines = [rank.stdout.readline() for rank in self._all if rank.stdout]
        if not all(lines):
            os._exit(1)
        return [json.loads(line) for line in lines]

    def _ends_with(self, rank: subprocess.Popen[str]) -> None:
        rank.wait()
        os._exit(1)


def main(port: int, weights: Path, count: int, library: Path) -> None:
    ranks, working = Ranks(weights, count, library), threading.Lock()
    awake = False

    def answer(path: str) -> tuple[HTTPStatus, object]:
        if path == "/health":
            return HTTPStatus.OK if awake else HTTPStatus.SERVICE_UNAVAILABLE, {}
        with working:
            said = ranks.ask("sum")
        digests = sorted({each for rank in said for each in rank["digests"]})
        return HTTPStatus.OK, {"digests": digests, "totals": sorted({rank["total"] for rank in said}), "ranks": len(said)}

    def quiesce() -> None:
        nonlocal awake
        if awake:
            working.acquire()
        awake = False
        ranks.ask("quiesce")

    def resume(moved: Mapping[str, str]) -> None:
        nonlocal awake
        ranks.ask({"moved": dict(moved), "meeting": secrets.token_hex(32)})
        awake = True
        working.release()

    server = json_server(port, answer)
    if control := ControlDirectory.from_environment():
        for directory, device in zip(ranks.directories, ranks.devices, strict=True):
            control.name_weights(directory, device)
        working.acquire()  # before anybody can ask
        control.start(quiesce, resume)
    else:
        awake = True
    server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank_main(int(sys.argv[2]), int(sys.argv[3]), *map(Path, sys.argv[4:8]), sys.argv[8])
    else:
        main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
