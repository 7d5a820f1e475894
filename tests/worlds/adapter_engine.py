"""A chat server with LoRA adapters, as vLLM lists them: `python adapter_engine.py PORT ADAPTER…`, which imports nothing of ours.

Each answers in its own way. An adapter by one of these names is broken: `broken` always, `dies` and `changes` once it was restored, `slow`
takes a second. `hidden` is served and not listed. `/asked` says who was asked, in which order.
"""

import http.server
import json
import os
import pathlib
import sys
import time

BASE = "base"
ASKED = []
RESTORED = pathlib.Path(os.environ.get("SNAPSHOT_CONTROL_DIR", "/nowhere"), "restore-complete")


def answer(model, adapters):
    """Status and body."""
    if model not in (BASE, *adapters) or model == "broken":
        return 404, {"error": f"no adapter {model} here"}
    if model == "dies" and RESTORED.exists():
        return 500, {"error": "its memory is not there"}
    if model == "slow":
        time.sleep(1)
    text = f"{model} says blue" + (" or red" if model == "changes" and RESTORED.exists() else "")
    ASKED.append(model)
    return 200, {"id": str(time.time()), "model": model, "choices": [{"message": {"content": text}}], "timings": {"ms": time.time()}}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        listed = [{"id": BASE, "parent": None}] + [{"id": name, "parent": BASE} for name in sys.argv[2:] if name != "hidden"]
        found = {"/health": {}, "/v1/models": {"data": listed}, "/asked": ASKED}
        self.say(*((200, found[self.path]) if self.path in found else (404, {})))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.say(*(answer(body["model"], sys.argv[2:]) if self.path == "/v1/chat/completions" else (404, {})))

    def say(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
