"""LoRA adapters: each has a recorded answer of its own, so that a replica in which one is broken is no proof."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.engine.adapters import prove_adapters, record_adapters
from restore_agent.engine.canary import Unproved, record_canary
from restore_agent.engine.engine import Engine, EngineError
from restore_agent.places.sandbox import Sandbox
from restore_agent.snapshots.catalog import Catalog, NotFound
from restore_agent.snapshots.manifest import AdapterRecord, CanaryRecord, EngineRecord
from tests.worlds.agent import PORT, Agent, get
from tests.worlds.command import zerowake

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces")
ENGINE = Path(__file__).parents[1] / "worlds/adapter_engine.py"
CHAT = "/v1/chat/completions"
# A server whose answers a test writes: GET by path, POST by what the body's `lora` or `model` says.
SCRIPTED = f"""
import http.server, json, pathlib
folder = pathlib.Path("/run/zerowake/control")
class Handler(http.server.BaseHTTPRequestHandler):
    def say(self, key):
        path = folder / key
        body = path.read_bytes() if path.exists() else b"{{}}"
        self.send_response(200 if path.exists() or key == "GET-health" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.say("GET" + self.path.replace("/", "-"))
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = ",".join(f"{{each['id']}}x{{each['scale']}}" for each in body["lora"]) if "lora" in body else body.get("model", "none")
        self.say("POST" + self.path.replace("/", "-") + ":" + asked)
    def log_message(self, *words):
        pass
http.server.ThreadingHTTPServer(("", {PORT}), Handler).serve_forever()
"""


async def served(tmp_path: Path, *command: str, seconds: float = 30) -> AsyncIterator[Engine]:
    async with await Sandbox.create(tmp_path / "criu.kdat") as sandbox:
        record = EngineRecord(command=command, env={"PATH": os.environ["PATH"]}, port=PORT, ready_timeout_seconds=seconds)
        engine = await Engine.start(record, sandbox, sandbox.output("engine"), for_snapshot=False)
        await engine.wait_healthy()
        yield engine
        engine.output.close()


@pytest.fixture
async def scripted(tmp_path: Path) -> AsyncIterator[Engine]:
    async for engine in served(tmp_path, sys.executable, "-c", SCRIPTED):
        yield engine


def says(engine: Engine, request: str, body: object) -> None:
    (engine.place.control_directory / request).write_text(json.dumps(body))


async def test_adapters_that_are_listed_with_a_parent_are_asked_by_name_in_the_canary_s_own_words(scripted: Engine) -> None:
    says(scripted, "GET-v1-models", {"data": [{"id": "base"}, {"id": "alias", "parent": None}, {"id": "sql", "parent": "base"}, "?"]})
    for name in ("base", "sql"):
        says(scripted, f"POST-ask:{name}", {"by": name})
    canary = await record_canary(scripted, "/ask", '{"model": "base", "prompt": "x"}')
    adapters = await record_adapters(scripted, canary, ())
    assert adapters == (AdapterRecord(name="sql", path="/ask", body='{"model": "sql", "prompt": "x"}', answer='{"by": "sql"}'),)
    await prove_adapters(scripted, adapters)
    says(scripted, "POST-ask:sql", {"by": "base"})
    with pytest.raises(Unproved, match=r"adapter 'sql' of the restored engine answers .*/ask.* otherwise: answer\.by is 'base', was 'sql'"):
        await prove_adapters(scripted, adapters)


async def test_those_of_llama_server_are_asked_by_number_each_alone(scripted: Engine) -> None:
    files = ["/m/poet.gguf", "/m/sql.gguf", "/n/sql.gguf"]
    says(scripted, "GET-lora-adapters", [{"id": number, "path": path, "scale": 1.0} for number, path in enumerate(files)])
    for asked in ("base", "0x1.0", "1x1.0", "2x1.0"):
        says(scripted, f"POST-v1-completions:{asked}", {"by": asked})
    canary = await record_canary(scripted, "/v1/completions", '{"model": "base"}')
    found = {adapter.name: json.loads(adapter.answer)["by"] for adapter in await record_adapters(scripted, canary, ())}
    assert found == {"poet": "0x1.0", "sql": "1x1.0", "sql#2": "2x1.0"}


async def test_one_that_is_named_only_is_asked_too_also_where_the_canary_names_no_model(scripted: Engine) -> None:
    says(scripted, "GET-sum", {"sum": 1})
    says(scripted, "GET-v1-models", {"data": [{"id": "listed", "parent": "base"}]})  # which is not looked at: it is no such server
    says(scripted, "POST-v1-completions:sql", {"by": "sql"})
    (adapter,) = await record_adapters(scripted, await record_canary(scripted, "/sum", ""), ("sql",))
    assert (adapter.name, adapter.path, json.loads(adapter.body)["model"]) == ("sql", "/v1/completions", "sql")
    (again,) = await record_adapters(scripted, CanaryRecord(path="/v1/completions", body="[1]", answer=""), ("sql",))
    assert again == adapter


async def test_a_server_that_lists_nothing_sensible_has_none(scripted: Engine) -> None:
    says(scripted, "GET-v1-models", {"data": {"sql": 1}})
    says(scripted, "GET-lora-adapters", {"error": "not here"})
    assert await record_adapters(scripted, CanaryRecord(path="/ask", body="{}", answer=""), ()) == ()


async def test_one_that_does_not_answer_is_named(scripted: Engine) -> None:
    with pytest.raises(EngineError, match=r"adapter 'sql' does not answer: /ask answers 404: .*; have the server load it"):
        await record_adapters(scripted, CanaryRecord(path="/ask", body="{}", answer=""), ("sql",))
    lost = AdapterRecord(name="sql", path="/ask", body='{"model": "sql"}', answer="{}")
    with pytest.raises(Unproved, match=r"adapter 'sql' of the restored engine did not answer the recorded request: /ask answers 404"):
        await prove_adapters(scripted, [lost])


async def test_all_of_them_have_as_long_as_the_engine_has_to_be_ready(tmp_path: Path) -> None:
    async for engine in served(tmp_path, sys.executable, str(ENGINE), str(PORT), "poet", "slow", seconds=0.9):
        canary = await record_canary(engine, "", "")
        with pytest.raises(EngineError, match=r"^1 of 2 adapters answered within the 1 s .* 'slow' not yet; give it more time"):
            await record_adapters(engine, canary, ())
        late = AdapterRecord(name="slow", path=CHAT, body='{"model": "slow"}', answer="{}")
        with pytest.raises(Unproved, match=r"adapter 'slow' of the restored engine had not answered when 1 s were over"):
            await prove_adapters(engine, [late])


def create(agent: Agent, *adapters: str, more: tuple[str, ...] = ()) -> list[str]:
    options = ["--port", str(PORT), "--state", str(agent.state), *more]
    return ["snapshot", "create", "adapted", *options, "--", sys.executable, str(ENGINE), str(PORT), *adapters]


@pytest.mark.usefixtures("needs_criu")
async def test_a_snapshot_has_the_answer_of_each_and_its_replicas_give_it(agent: Agent) -> None:
    said = await zerowake(*create(agent, "sql", "poet", "hidden", more=("--adapter", "hidden")))
    assert "; proved, with its adapters sql, poet, hidden\n" in said
    manifest = json.loads(await zerowake("snapshot", "show", "--state", str(agent.state), "adapted"))
    answers = {each["name"]: json.loads(each["answer"])["choices"][0]["message"]["content"] for each in manifest["adapters"]}
    assert answers == {"sql": "sql says blue", "poet": "poet says blue", "hidden": "hidden says blue"}
    verified = await zerowake("snapshot", "verify", "--state", str(agent.state), "adapted")
    assert verified.endswith("; it was proved with its adapters sql, poet, hidden\n")
    replica = (await agent.restore("adapted")).replica
    assert get(replica, "/asked") == ["base", "sql", "poet", "hidden"] * 2, "twice before the dump, and nobody at a restore"


@pytest.mark.usefixtures("needs_criu")
@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("broken", r"^zerowake: adapter 'broken' does not answer: /v1/chat/completions answers 404: .*no adapter broken here"),
        ("dies", r"^zerowake: adapter 'dies' of the restored engine did not answer .* answers 500: .*its memory is not there"),
        ("changes", r"^zerowake: adapter 'changes' of the restored engine answers .* otherwise: .*is 'changes says blue or red', was"),
    ],
)
async def test_a_broken_one_is_found_at_create_or_when_it_is_restored_and_there_is_no_snapshot(
    agent: Agent, adapter: str, words: str
) -> None:
    told = await zerowake(*create(agent, "poet", adapter), code=1)
    assert re.search(words, told.strip()), told
    with pytest.raises(NotFound):
        Catalog(agent.state).get("default", "adapted")
