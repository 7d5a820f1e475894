"""The canary: which differences between two answers count, and what an engine without a usual path is told."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.engine.canary import Unproved, prove_canary, record_canary
from restore_agent.engine.engine import Engine, EngineError
from restore_agent.places.sandbox import Sandbox
from restore_agent.snapshots.manifest import CanaryRecord, EngineRecord

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces")
PORT = 8000
# Answers what stands in the files that the test writes into its control directory: METHOD-path, slashes as dashes.
SERVER = f"""
import http.server, os, pathlib
folder = pathlib.Path("/run/zerowake/control")
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = folder / (self.command + self.path.replace("/", "-"))
        body = path.read_bytes() if path.exists() else b"not here"
        self.send_response(200 if path.exists() or self.path == "/health" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST = answer
    def log_message(self, *words):
        pass
http.server.ThreadingHTTPServer(("", {PORT}), Handler).serve_forever()
"""


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    async with await Sandbox.create(tmp_path / "criu.kdat") as sandbox:
        record = EngineRecord(command=(sys.executable, "-c", SERVER), env={"PATH": os.environ["PATH"]}, port=PORT)
        engine = await Engine.start(record, sandbox, sandbox.output("engine"), for_snapshot=False)
        await engine.wait_healthy()
        yield engine
        engine.output.close()


def answers(engine: Engine, request: str, body: object) -> None:
    (engine.place.control_directory / request).write_text(body if isinstance(body, str) else json.dumps(body))


async def test_what_was_answered_once_is_asked_again(engine: Engine) -> None:
    answers(engine, "POST-sum", {"digest": "abc"})
    canary = await record_canary(engine, "/sum", '{"of": "all"}')
    assert canary == CanaryRecord(path="/sum", body='{"of": "all"}', answer='{"digest": "abc"}')
    await prove_canary(engine, canary)
    answers(engine, "POST-sum", {"digest": "abd"})
    with pytest.raises(Unproved, match=r"\(/sum\) otherwise: answer.digest is 'abd', was 'abc'"):
        await prove_canary(engine, canary)


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        ({"id": "1", "created": 1, "n": 1}, {"id": "2", "created": 2, "n": 1}, ""),
        ({"logprobs": [-0.5, -1.25]}, {"logprobs": [-0.5004, -1.2496]}, ""),
        ({"logprobs": [-0.5, -1.25]}, {"logprobs": [-0.5, -1.26]}, r"answer.logprobs\[1\] is -1.26, was -1.25"),
        ({"n": 1}, {"n": 2}, "answer.n is 2, was 1"),
        ({"a": 1}, {"a": 1, "b": 2}, "answer.b is 2, was None"),
        ([1, 2], [1], r"answer is \[1\], was \[1, 2\]"),
        ("plain words", "plain words", ""),
        ("plain words", "other words", "answer is 'other words', was 'plain words'"),
    ],
)
async def test_which_differences_count(engine: Engine, before: object, after: object, difference: str) -> None:
    answers(engine, "GET-x", before)
    canary = await record_canary(engine, "/x", "")
    answers(engine, "GET-x", after)
    if difference:
        with pytest.raises(Unproved, match=difference):
            await prove_canary(engine, canary)
    else:
        await prove_canary(engine, canary)


async def test_with_no_path_the_first_of_the_usual_ones_that_answers(engine: Engine) -> None:
    answers(engine, "GET-v1-models", {"data": [{"id": "tiny"}]})
    answers(engine, "POST-v1-embeddings", {"data": [0.5]})
    canary = await record_canary(engine, "", "")
    assert canary.path == "/v1/embeddings"
    assert json.loads(canary.body)["model"] == "tiny"
    answers(engine, "POST-v1-chat-completions", {"choices": []})
    assert (await record_canary(engine, "", "")).path == "/v1/chat/completions"


async def test_an_engine_that_answers_none_of_them_is_told_what_to_do(engine: Engine) -> None:
    with pytest.raises(EngineError, match=r"name one with --canary.*/v1/embeddings answers 404: not here"):
        await record_canary(engine, "", "")


async def test_a_replica_that_does_not_answer_is_unproved(engine: Engine) -> None:
    canary = CanaryRecord(path="/sum", answer="x")
    with pytest.raises(Unproved, match="did not answer the recorded request: /sum answers 404"):
        await prove_canary(engine, canary)
    os.kill(engine.place.host_pids()[engine.pid], 9)
    await asyncio.wait_for(asyncio.shield(engine.place.exit_of(engine.pid)), 10)
    with pytest.raises(Unproved, match="did not answer"):
        await prove_canary(engine, canary)
