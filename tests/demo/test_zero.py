"""A real language model from zero, as OpenAI's own client sees it: `zerowake up`, a snapshot, CRIU, and the answers of the cold engine."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml
from openai import AsyncOpenAI

from tests.worlds.command import zerowake
from tests.worlds.demo_engine import ENGINES, started

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for CRIU and namespaces")

MODEL = "chat"
QUESTION = {"model": MODEL, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("zero") / "state"
    command = [sys.executable, str(ENGINES / "chat.py"), "--port", "8000"]
    asyncio.run(zerowake("snapshot", "create", MODEL, "--state", str(state), "--port", "8000", "--", *command))
    return state


@pytest.fixture
async def client(state: Path) -> AsyncIterator[AsyncOpenAI]:
    """At a gateway with no replica, which goes back to zero half a second after each request."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = state.parent / "up.yaml"
    model = {"snapshot": MODEL, "cooldown_seconds": 0.5, "polling_seconds": 0.2}
    file.write_text(yaml.safe_dump({"state": "state", "listen": f"127.0.0.1:{port}", "models": {MODEL: model}}))
    with (state.parent / "up.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "scaler.programs.cli", "up", str(file), stderr=log, stdout=log)
    try:
        async with asyncio.timeout(20):
            while True:
                try:
                    (await asyncio.open_connection("127.0.0.1", port))[1].close()
                    break
                except ConnectionRefusedError:
                    await asyncio.sleep(0.05)  # until it listens
        yield AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 30) == 0


@pytest.fixture(scope="module")
def cold() -> str:
    """What the engine answers that was started as always."""

    async def ask(url: str) -> str:
        answer = await AsyncOpenAI(base_url=f"{url}/v1", api_key="none").chat.completions.create(**QUESTION)
        return answer.choices[0].message.content or ""

    with started("chat.py") as engine:
        return asyncio.run(ask(engine.url))


async def test_a_stream_from_zero(client: AsyncOpenAI, cold: str) -> None:
    text = ""
    async for chunk in await client.chat.completions.create(**QUESTION, stream=True):
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
    assert text == cold


async def test_a_whole_answer_from_zero(client: AsyncOpenAI, cold: str) -> None:
    answer = await client.chat.completions.create(**QUESTION)
    assert answer.choices[0].message.content == cold


async def test_a_stream_that_is_left_half_way(client: AsyncOpenAI, cold: str) -> None:
    """The next one is answered as if nothing had been."""
    stream = await client.chat.completions.create(**QUESTION, stream=True)
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            break
    await stream.close()
    answer = await client.chat.completions.create(**QUESTION)
    assert answer.choices[0].message.content == cold
