"""A server that compiles as it starts, without a compiler: Python's modules, by the hash of their source, where TorchInductor has kernels.

    module_compiling_engine.py PORT

`/compiled` says how many it had to compile, `/sum` what they compute.
"""

import getpass
import hashlib
import http.server
import json
import marshal
import os
import sys
from collections.abc import Callable
from pathlib import Path

KERNELS = 3


def kernel(cache: Path, number: int) -> tuple[Callable[[int], int], bool]:
    """It, and whether it had to be compiled."""
    source = f"def kernel(x):\n    return x * {number} + {number}\n"
    file = cache / hashlib.sha256(source.encode()).hexdigest()[:20]
    missing = not file.exists()
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        file.write_bytes(marshal.dumps(compile(source, str(file), "exec")))
    scope: dict[str, Callable[[int], int]] = {}
    exec(marshal.loads(file.read_bytes()), scope)
    return scope["kernel"], missing


def main() -> None:
    cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"/tmp/torchinductor_{getpass.getuser()}")
    found = [kernel(cache, number) for number in range(1, KERNELS + 1)]
    compiled = sum(missing for _, missing in found)

    class Handler(http.server.BaseHTTPRequestHandler):
        """What they compute."""

        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answers = {"/compiled": compiled, "/sum": sum(each(3) for each, _ in found), "/health": "well"}
            body = json.dumps(answers.get(self.path)).encode()
            self.send_response(200 if self.path in answers else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nobody reads it."""

    http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Handler).serve_forever()


if __name__ == "__main__":
    main()
