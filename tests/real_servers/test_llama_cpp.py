"""llama.cpp's two servers with a real model and LoRA adapters, by `--engine llama-cpp`: shared, proved, and told what they know."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from zerowake_proto import agent_pb2 as pb

from restore_agent.engine import presets
from restore_agent.snapshots.catalog import Catalog
from tests.worlds.agent import Agent, get, post
from tests.worlds.llama_cpp import lora, mappings, model, server
from tests.worlds.ports import free_port
from tests.worlds.served import answers_of_three, snapshot
from zerowake_shared.network_namespace import NetworkNamespace

ASKED = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, "seed": 1}
PRESET = ("--engine", "llama-cpp")
START_SECONDS = 30.0


@pytest.fixture
def llama_server() -> str:
    found = server()
    if found is None:
        pytest.skip("needs llama-server: `make servers` installs it")
    return found


@pytest.fixture
def computing(llama_server: str) -> str:
    """One that computes on this processor. The package's is compiled for the one that it was made on, with what others lack."""
    command = [llama_server, "--model", str(model()), "--ctx-size", "512", "--port", str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        deadline = threading.Timer(START_SECONDS, process.kill)
        deadline.start()
        next((line for line in process.stdout if "listening" in line), "")  # it has computed by then, or has ended
        deadline.cancel()
        process.kill()
    if process.returncode == -signal.SIGILL:
        pytest.skip("needs a llama-server that runs on this processor: that of `make servers` ends with SIGILL as it computes")
    return llama_server


def text(answer: object) -> str:
    said = answer["choices"][0]["text"]  # type: ignore[index]
    assert isinstance(said, str)
    return said


def by(*adapters: int) -> dict[str, object]:
    """Asks llama-server for these adapters of two; by itself it takes both."""
    return {**ASKED, "lora": [{"id": number, "scale": float(number in adapters)} for number in (0, 1)]}


def stream(replica: pb.Replica, body: object, health: str) -> bytes:
    """All that it streams, while its health is asked in the middle."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: engine\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    with NetworkNamespace(replica.endpoint.netns) as network, network.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.settimeout(60)
        connection.connect((replica.endpoint.host, replica.endpoint.port))
        connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + content)
        begun = connection.recv(1 << 16)
        assert get(replica, health)
        return begun + b"".join(iter(lambda: connection.recv(1 << 16), b""))


def is_shared() -> None:
    """By all three: each page of the model's file is in memory once, and none of it is a copy."""
    found = list(mappings(model()))
    assert len({mapping["pid"] for mapping in found}) == 3
    size = model().stat().st_size
    assert sum(mapping["Rss"] for mapping in found) > 2 * size, "each has read it"
    assert sum(mapping["Pss"] for mapping in found) <= 1.05 * size
    assert sum(mapping["Anonymous"] + mapping["Locked"] for mapping in found) == 0


async def test_llama_server_shares_its_model_and_each_adapter_answers_as_it_did(agent: Agent, tmp_path: Path, computing: str) -> None:
    adapters = [lora(tmp_path / f"{name}.gguf", seed) for seed, name in enumerate(("sql", "poet"))]
    command = [computing, "--model", str(model()), "--ctx-size", "1024", "--lora", ",".join(map(str, adapters))]
    said = await snapshot(agent, "llama", command, *PRESET)
    assert "; proved, with its adapters sql, poet\n" in said
    manifest = Catalog(agent.state).get("default", "llama").manifest
    assert manifest.canary and manifest.canary.path == "/v1/chat/completions"
    recorded = [json.loads(each.answer)["choices"] for each in (manifest.canary, *manifest.adapters)]
    assert recorded[0] != recorded[1] != recorded[2] != recorded[0], "each answers in its own way"
    assert manifest.image_bytes < model().stat().st_size, "which is not in it"
    assert any(file.path == str(model()) for file in manifest.fits.mapped_files)

    answers = await answers_of_three(agent, "llama", lambda replica: post(replica, "/v1/completions", by()), 1, is_shared)
    assert all("Paris" in text(answer) for answer in answers)
    replica = (await agent.restore("llama")).replica
    tuned = {text(post(replica, "/v1/completions", by(number))) for number in (0, 1)}
    assert len(tuned | {text(answers[0])}) == 3


async def test_llama_cpp_python_shares_its_model_and_is_proved_with_the_adapter_that_is_named(agent: Agent, tmp_path: Path) -> None:
    """It has one model in memory, and reads the other anew when it is asked for."""
    pytest.importorskip("llama_cpp")
    file, tuned = str(model()), str(lora(tmp_path / "sql.gguf", 0))
    of_model = {"n_ctx": 512, "n_threads": 2, "n_threads_batch": 2, "model": file}
    models = [{**of_model, "model_alias": "base"}, {**of_model, "model_alias": "sql", "lora_path": tuned}]
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"port": 8000, "models": models}))
    command = [sys.executable, "-m", "llama_cpp.server", "--config_file", str(config)]
    assert "; proved, with its adapters sql\n" in await snapshot(agent, "llama", command, *PRESET, "--adapter", "sql", patience=240)
    manifest = Catalog(agent.state).get("default", "llama").manifest
    assert manifest.canary and json.loads(manifest.canary.answer)["choices"] != json.loads(manifest.adapters[0].answer)["choices"]
    asked = {**ASKED, "model": "base"}
    answers = await answers_of_three(agent, "llama", lambda replica: post(replica, "/v1/completions", asked), 1, is_shared)
    assert {text(answer) for answer in answers} and all("Paris" in text(answer) for answer in answers)

    response = await agent.restore("llama")
    long = {**asked, "max_tokens": 150, "stream": True}
    streamed = await asyncio.to_thread(stream, response.replica, long, manifest.engine.health_path)
    assert streamed.count(b"data: {") >= 100 and b"data: [DONE]" in streamed, "the probe of its health did not end it"


async def test_a_model_that_would_not_be_shared_is_refused_before_anything_starts(agent: Agent, llama_server: str) -> None:
    told = await snapshot(agent, "llama", [llama_server, "--model", str(model()), "--no-mmap"], *PRESET, code=1)
    assert told.startswith("zerowake: --no-mmap: it makes the weights memory of each replica's own") and told.count("\n") == 1


def test_llama_server_knows_what_it_is_told_and_refused(llama_server: str) -> None:
    there = subprocess.run([llama_server, "--help"], capture_output=True, text=True, check=True).stdout
    options = [name for names in presets._THREADS for name in names] + [row[0] for row in presets._NOT_SHARED]
    variables = [row[1] for row in presets._NOT_SHARED] + [name for name in presets.KINDS["llama-cpp"].env(()) if name.startswith("LLAMA_")]
    for name in filter(None, [*options, "--port", "--api-prefix", "--repack"]):
        assert any(name in line.replace(",", " ").split() for line in there.splitlines()), name
    for name in filter(None, variables):
        assert f"(env: {name.replace('_NO_', '_')})" in there, name
