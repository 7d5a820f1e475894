"""A threaded server of Python's that draws random numbers in every way: drawing_engine.py PORT [SEED] [--told]

It has drawn some when it listens, as servers have. `/draw` draws once of each. `/back` is what the control directory says of its return,
with the mode and the owner of the file. SEED: of numpy and random. `--told`: it takes part in the control directory; else it imports
nothing of ours.
"""

from __future__ import annotations

import json
import os
import random
import ssl
import sys
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey


def draw() -> dict[str, object]:
    return {
        "random": random.random(),
        "numpy": float(np.random.random()),
        "openssl": ssl.RAND_bytes(16).hex(),
        "cryptography": X25519PrivateKey.generate().private_bytes_raw().hex(),  # by the OpenSSL that it brings
        "uuid4": str(uuid.uuid4()),
    }


def back() -> dict[str, object]:
    word = Path(os.environ["SNAPSHOT_CONTROL_DIR"], "restore-complete")
    at = word.stat()
    return {**json.loads(word.read_text()), "mode": oct(at.st_mode & 0o777), "owner": at.st_uid}


class Handler(BaseHTTPRequestHandler):
    """Answers every GET."""

    def do_GET(self) -> None:
        answers = {"/draw": draw, "/back": back}
        content = json.dumps(answers.get(self.path, lambda: {"well": True})()).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass


if __name__ == "__main__":
    port, *options = sys.argv[1:]
    for seed in (int(option) for option in options if option.isdigit()):
        random.seed(seed)
        np.random.seed(seed)
    draw()
    server = ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
    if "--told" in options:
        from restore_agent.workload.control_directory import ControlDirectory

        control = ControlDirectory.from_environment()
        if control:
            control.start(lambda: None, lambda moved: None)
    server.serve_forever()
