"""A threaded server that takes part in the control directory, as an engine in a pod does: dozing_engine.py PORT MEBIBYTES

GET /sum answers with a hash of its memory, and waits while the engine has let go of it; /stream?seconds=S with a word every tenth of
one; /count with how often it has quiesced, and its pid; all else is its health. It may be given as text to `python -c`, where
restore_agent's package for engines is on the path.
"""

import hashlib
import http.server
import json
import os
import random
import sys
import threading
import time
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlsplit

from restore_agent.workload.control_directory import ControlDirectory

CONTENT = bytearray(random.Random(7).randbytes(int(sys.argv[2]) << 20))
HERE = threading.Event()  # but while it has let go
QUIESCED: list[float] = []


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection's requests."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        if split.path == "/stream":
            self._stream(float(dict(parse_qsl(split.query))["seconds"]))
        elif split.path == "/sum":
            HERE.wait()
            self._say({"digest": hashlib.sha256(CONTENT).hexdigest()})
        else:
            self._say({"quiesced": len(QUIESCED), "pid": os.getpid()} if split.path == "/count" else {})

    def _stream(self, seconds: float) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(round(seconds * 10)):
            self.wfile.write(b"5\r\nword\n\r\n")
            time.sleep(0.1)
        self.wfile.write(b"0\r\n\r\n")

    def _say(self, body: Mapping[str, object]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Not every probe."""


def quiesce() -> None:
    QUIESCED.append(time.monotonic())
    HERE.clear()


if __name__ == "__main__":
    threading.Thread(target=threading.Event().wait, daemon=True).start()  # every real engine has threads that wait for work
    HERE.set()
    if control := ControlDirectory.from_environment():
        control.start(quiesce, lambda moved: HERE.set())
    http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Handler).serve_forever()
