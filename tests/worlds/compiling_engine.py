"""A server that compiles kernels as it starts, as engines do: C++ by g++ into a cache, keyed by its source, loaded from there by dlopen.

    compiling_engine.py PORT KERNELS

It looks for its cache where TorchInductor and Triton have theirs. `/compiled` says how many it had to compile, `/sum` what they compute.
"""

import ctypes
import hashlib
import http.server
import json
import os
import subprocess
import sys
from pathlib import Path


def cache() -> Path:
    """TorchInductor's."""
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or "/tmp/torchinductor_root")


def kernel(number: int) -> tuple[ctypes.CDLL, bool]:
    """The kernel, and whether it had to be compiled."""
    source = f'extern "C" long kernel(long x) {{ return x * {number} + {number}; }}\n'
    key = hashlib.sha256(source.encode()).hexdigest()[:20]
    folder = cache() / key[:2]
    library = folder / f"{key}.so"
    missing = not library.exists()
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.cpp").write_text(source)
        fresh = library.with_suffix(".fresh")
        subprocess.run(["g++", "-shared", "-fPIC", "-O3", "-o", str(fresh), str(folder / f"{key}.cpp")], check=True)
        fresh.rename(library)
    else:
        (folder / f"{key}.cpp").read_text()
    return ctypes.CDLL(str(library)), missing


def main() -> None:
    port, count = int(sys.argv[1]), int(sys.argv[2])
    found = [kernel(number) for number in range(1, count + 1)]
    compiled = sum(missing for _, missing in found)

    class Handler(http.server.BaseHTTPRequestHandler):
        """What the kernels compute."""

        def do_GET(self) -> None:
            answers = {"/compiled": compiled, "/sum": sum(library.kernel(3) for library, _ in found), "/health": "well"}
            body = json.dumps(answers.get(self.path)).encode()
            self.send_response(200 if self.path in answers else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nobody reads it."""

    http.server.ThreadingHTTPServer(("", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
