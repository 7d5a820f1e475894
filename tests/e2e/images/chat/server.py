"""Answers /v1/chat/completions with the words in reverse: `python server.py --port PORT`. As in model servers, one thread thinks."""

import argparse
import concurrent.futures
import http.server
import json
import secrets

thinker = concurrent.futures.ThreadPoolExecutor(1)


def reversed_words(text: str) -> str:
    return " ".join(reversed(text.split()))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = thinker.submit(reversed_words, asked["messages"][-1]["content"]).result()
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        self.answer({"id": secrets.token_hex(4), "object": "chat.completion", "model": asked["model"], "choices": [choice]})

    def answer(self, body: dict[str, object]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    thinker.submit(reversed_words, "").result()  # it waits from now on
    http.server.ThreadingHTTPServer(("", parser.parse_args().port), Handler).serve_forever()
