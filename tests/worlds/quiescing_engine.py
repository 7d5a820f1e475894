"""A server that takes part in the control directory and was lent nothing, so that any machine can park it: quiescing_engine.py PORT

It counts the requests for /count: the same process answers with the next number.
"""

from __future__ import annotations

import itertools
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from restore_agent.workload.control_directory import ControlDirectory

COUNT = itertools.count(1)


class Handler(BaseHTTPRequestHandler):
    """Answers every GET."""

    def do_GET(self) -> None:
        content = json.dumps({"count": next(COUNT)} if self.path.endswith("/count") else {"well": True}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    if control := ControlDirectory.from_environment():
        control.start(lambda: None, lambda moved: None)
    server.serve_forever()
