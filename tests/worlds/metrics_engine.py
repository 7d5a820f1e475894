"""An engine as its page of metrics: a process of its own, whose page is whatever its file says, as vLLM and SGLang write theirs.

`python tests/worlds/metrics_engine.py FILE PORT`; PORT 0: any. It prints the port.
"""

from __future__ import annotations

import contextlib
import http.server
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def vllm(waiting: str, running: str) -> str:
    """As vLLM 0.23 has it, with other numbers between."""
    labels = '{engine="0",model_name="chat"}'
    return (
        "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
        "# TYPE vllm:num_requests_running gauge\n"
        f"vllm:num_requests_running{labels} {running}\n"
        "# HELP vllm:num_requests_waiting Number of requests waiting to be processed.\n"
        "# TYPE vllm:num_requests_waiting gauge\n"
        f"vllm:num_requests_waiting{labels} {waiting}\n"
        "# HELP vllm:num_requests_waiting_by_reason Number of waiting requests by reason.\n"
        f'vllm:num_requests_waiting_by_reason{{engine="0",reason="capacity"}} {waiting}\n'
        "# TYPE vllm:kv_cache_usage_perc gauge\n"
        f"vllm:kv_cache_usage_perc{labels} 0.25\n"
    )


def sglang(queued: str, running: str) -> str:
    """As SGLang has it, of two ranks of which each counts the same requests."""
    lines = []
    for name, value in (("sglang:num_running_reqs", running), ("sglang:num_queue_reqs", queued)):
        lines += [f"# TYPE {name} gauge"]
        lines += [f'{name}{{engine_type="unified",model_name="chat",pp_rank="0",tp_rank="{rank}"}} {value}' for rank in (0, 1)]
    return "\n".join(lines) + "\n"


@dataclass
class MetricsEngine:
    page: Path
    port: int
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/metrics"

    def shows(self, page: str) -> None:
        new = self.page.with_suffix(".new")
        new.write_text(page)
        new.replace(self.page)


@contextlib.contextmanager
def metrics_engine(page: Path, prefix: tuple[str, ...] = (), port: int = 0) -> Iterator[MetricsEngine]:
    """prefix: what it is run by, such as `ip netns exec NAME`."""
    page.write_text(vllm("0", "0"))
    command = [*prefix, sys.executable, __file__, str(page), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield MetricsEngine(page, int(process.stdout.readline()), process)
        finally:
            process.kill()


class _Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = Path(sys.argv[1]).read_bytes() if self.path == "/metrics" else b""
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), _Page)
    print(server.server_address[1], flush=True)
    server.serve_forever()
