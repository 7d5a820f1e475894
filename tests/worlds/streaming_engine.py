"""An engine as users write them: a threaded server of Python's own, whose answers take their time.

    python streaming_engine.py PORT [handles] [alone]

`handles`: at SIGTERM it stops accepting, finishes its answers and exits with 5; `alone`: it has one thread, and does one thing at a time.

GET /stream?n=N&every=SECONDS answers with N events, `data: 0` to `data: N-1`; /slow?seconds=S with one word after so long; /count with how
often each of them was asked; all else is its health. It needs nothing but the standard library, and may be given as text to `python -c`.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

ASKED: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    """One connection's requests."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        query = dict(parse_qsl(split.query))
        ASKED[split.path] += 1
        if split.path == "/stream":
            self._stream(int(query["n"]), float(query["every"]))
        elif split.path == "/slow":
            time.sleep(float(query["seconds"]))
            self._say(b"done")
        elif split.path == "/count":
            self._say(str(sum(ASKED[path] for path in ("/stream", "/slow"))).encode())
        else:
            self._say(b"{}")

    def _stream(self, count: int, every: float) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(count):
            self._chunk(b"data: %d\n\n" % number)
            time.sleep(every)
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _say(self, text: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Not every probe."""


def main() -> None:
    server = (HTTPServer if "alone" in sys.argv[2:] else ThreadingHTTPServer)(("", int(sys.argv[1])), Handler)
    if isinstance(server, ThreadingHTTPServer):
        server.daemon_threads = False
    if "handles" in sys.argv[2:]:
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print("serving", flush=True)
    server.serve_forever()
    server.server_close()  # waits for the threads
    sys.exit(5)


if __name__ == "__main__":
    main()
