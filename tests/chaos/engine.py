"""The model server of the fault run: a threaded server of Python's own, as users write them, whose memory decides its answers.

    python engine.py PORT MODEL JOURNAL [LENT]

Every answer is a hash over a stretch of a table of four mebibytes, which the model's name decides, and over the request's id: a page that
was restored wrongly makes wrong answers. LENT: a folder of safetensors whose bytes are that table, lent by gpumem.
GET /answer?id=ID and POST /answer (JSON with `id`) answer at once, or after `seconds`; GET /stream?id=ID&n=N answers with N events;
GET /sum?id=ID is about all of the table, so that no wrong bit of it is missed.
Each id that it begins and ends with is a line of JOURNAL, which is a file of the machine's.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

SIZE = 4 << 20
PORT, MODEL, JOURNAL = int(sys.argv[1]), sys.argv[2], sys.argv[3]
AWAY = threading.Lock()  # held while the table is away


def own_table() -> memoryview:
    return memoryview(random.Random(MODEL).randbytes(SIZE))


def lent_table(folder: Path) -> memoryview:
    """Borrowed from gpumem, which fills it from the folder; let go of for every snapshot."""
    # Else every engine would hold them.
    from gpumem.checkpoint.safetensors import read_checkpoint  # noqa: PLC0415
    from gpumem.client import Client  # noqa: PLC0415
    from restore_agent.workload.control_directory import ControlDirectory  # noqa: PLC0415

    found = read_checkpoint(folder)
    client = Client(label=MODEL)
    region = client.attach(client.fill(found.layout, found.parts).id, wait=20)
    view = region.view()

    def quiesce() -> None:
        AWAY.acquire()
        client.quiesce()

    def resume(moved: object) -> None:
        client.resume()
        AWAY.release()

    if control := ControlDirectory.from_environment():
        control.name_weights(folder)
        control.start(quiesce, resume)
    return view


def note(identity: str, what: str) -> None:
    """A line of the journal, by one write. `replica`: its network namespace, which no two replicas share."""
    replica = str(Path("/proc/self/ns/net").readlink())
    line = json.dumps({"at": time.time(), "id": identity, "what": what, "model": MODEL, "replica": replica})
    descriptor = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, line.encode() + b"\n")
    finally:
        os.close(descriptor)


def answer_to(identity: str) -> str:
    with AWAY:
        at = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "big") % (SIZE - 4096)
        return hashlib.sha256(TABLE[at : at + 4096].tobytes() + identity.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One connection's requests."""

    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        query = dict(parse_qsl(split.query))
        if split.path == "/answer":
            self._answer(query)
        elif split.path == "/stream":
            self._stream(query)
        elif split.path == "/sum":
            self._sum(query)
        else:
            self._say({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, asked: dict[str, str]) -> None:
        note(asked["id"], "begin")
        time.sleep(float(asked.get("seconds", 0)))
        answer = answer_to(asked["id"])
        note(asked["id"], "end")
        self._say({"id": asked["id"], "answer": answer})

    def _sum(self, asked: dict[str, str]) -> None:
        identity = asked.get("id", "")  # none: it is a canary's
        if identity:
            note(identity, "begin")
        with AWAY:
            answer = hashlib.sha256(bytes(TABLE) + identity.encode()).hexdigest()
        if identity:
            note(identity, "end")
        self._say({"id": identity, "answer": answer})

    def _stream(self, asked: dict[str, str]) -> None:
        note(asked["id"], "begin")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for number in range(int(asked["n"])):
                self._chunk(b"data: %d %s\n\n" % (number, answer_to(f"{asked['id']}/{number}").encode()))
                time.sleep(float(asked.get("seconds", 0.02)))
            note(asked["id"], "last")  # until here the answer has not ended for anybody
            self._chunk(b"")
        finally:
            note(asked["id"], "end")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _say(self, what: dict[str, str]) -> None:
        text = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Not every probe."""


if __name__ == "__main__":
    TABLE = lent_table(Path(sys.argv[4])) if len(sys.argv) > 4 else own_table()
    ThreadingHTTPServer(("", PORT), Handler).serve_forever()
