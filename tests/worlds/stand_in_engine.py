"""A server that uses a GPU of stand_in_driver.py: the first that it finds, which it holds open. It runs in images that have nothing of
ours, as the text of a command: `python3 -c TEXT PORT`. `/sum` is its answer, and `/gpu` where it is."""

import http.server
import json
import os
import signal
import sys
import threading
from pathlib import Path

CLOSE, OPEN = signal.SIGRTMIN + 1, signal.SIGRTMIN + 8  # as stand_in_driver.py has them
held: list[int] = []


def open_gpu(minor: int) -> None:
    held.append(os.open(f"/dev/nvidia{minor}", os.O_RDWR))
    Path("/tmp/stand-in-gpu").write_text(str(minor))


def close_gpu() -> None:
    while held:
        os.close(held.pop())


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = {"holds": [str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in held]} if self.path == "/gpu" else {"sum": 3}
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Its requests are nobody's business."""


# They are waited for, not handled: one that came between a handler and the next `pause` would be heard with the next one only, and an agent
# that dumps the process stops it just there.
SIGNALS = {CLOSE, *range(OPEN, OPEN + 8)}
signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
open_gpu(min(int(path.name.removeprefix("nvidia")) for path in Path("/dev").glob("nvidia[0-9]")))
threading.Thread(target=http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Handler).serve_forever, daemon=True).start()
while True:
    if (told := signal.sigwait(SIGNALS)) == CLOSE:
        close_gpu()
    else:
        open_gpu(told - OPEN)
