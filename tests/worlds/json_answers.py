"""HTTP servers of the tests' engines: what a GET is answered, as JSON."""

from __future__ import annotations

import http.server
import json
from collections.abc import Callable
from http import HTTPStatus

Answer = Callable[[str], tuple[HTTPStatus, object]]
"""What a path is answered: the status and the body."""


def json_server(port: int, answer: Answer) -> http.server.ThreadingHTTPServer:
    """Listens on the loopback interface from now on, and answers in a thread each once it is told to serve."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, body = answer(self.path)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words: object) -> None:
            """Nobody reads it."""

    return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
