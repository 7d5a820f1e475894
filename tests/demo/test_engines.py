"""The demo engines as a client, a snapshot's agent and the kernel see them."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from tests.worlds.demo_engine import Served, assert_can_be_dumped, started
from tests.worlds.waiting import until

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ESSAY = [{"role": "user", "content": "Write down all numbers from one to a million."}]


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


async def ask(http: aiohttp.ClientSession, engine: Served, **fields: Any) -> dict[str, Any]:
    body = {"messages": QUESTION, "max_tokens": 24} | fields
    async with http.post(f"{engine.url}/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


async def stream(http: aiohttp.ClientSession, engine: Served, **fields: Any) -> list[dict[str, Any]]:
    """The events of a streamed answer, which must end as OpenAI's do."""
    body = {"messages": QUESTION, "max_tokens": 24, "stream": True, "stream_options": {"include_usage": True}} | fields
    async with http.post(f"{engine.url}/v1/chat/completions", json=body) as response:
        assert response.content_type == "text/event-stream"
        *events, last = [line.removeprefix("data: ") for line in (await response.text()).split("\n\n") if line]
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


async def test_greedy_answer_is_right_and_the_same_again(chat: Served, http: aiohttp.ClientSession) -> None:
    first, second = [await ask(http, chat, logprobs=True) for _ in range(2)]
    assert "Paris" in first["choices"][0]["message"]["content"]
    assert first["choices"] == second["choices"]
    assert first["choices"][0]["finish_reason"] == "stop"
    entries = first["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == first["choices"][0]["message"]["content"]
    assert all(-20 < entry["logprob"] < 0 for entry in entries)
    assert first["usage"]["completion_tokens"] == len(entries) + 1  # the token that ends the answer has no text


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 5}, {"stop": " Paris"}, {"temperature": 0.7, "seed": 7}])
async def test_streamed_answer_equals_the_whole_one(chat: Served, http: aiohttp.ClientSession, fields: dict[str, Any]) -> None:
    whole = await ask(http, chat, **fields)
    *events, last = await stream(http, chat, **fields)
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == whole["choices"][0]["message"]["content"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert last["usage"] == whole["usage"]
    assert len(events) > 2, "it came in one piece"


async def test_limits_and_stops(chat: Served, http: aiohttp.ClientSession) -> None:
    short = await ask(http, chat, max_completion_tokens=5)
    assert (short["choices"][0]["finish_reason"], short["usage"]["completion_tokens"]) == ("length", 5)
    stopped = await ask(http, chat, stop=["nothing like it", " is Paris"])
    assert stopped["choices"][0]["message"]["content"] == "The capital of France"
    assert stopped["choices"][0]["finish_reason"] == "stop"


async def test_seeds(chat: Served, http: aiohttp.ClientSession) -> None:
    async def story(**fields: Any) -> str:
        answer = await ask(http, chat, messages=[{"role": "user", "content": "Tell me a story."}], temperature=1.5, **fields)
        text: str = answer["choices"][0]["message"]["content"]
        return text

    assert await story(seed=1) == await story(seed=1) != await story(seed=2)
    assert await story() != await story()


async def test_requests_share_the_engine(chat: Served, http: aiohttp.ClientSession) -> None:
    """A short question is answered while a long answer is being written."""
    essay = {"messages": ESSAY, "max_tokens": 8000, "stream": True}
    async with http.post(f"{chat.url}/v1/chat/completions", json=essay) as response:
        await response.content.readline()
        answers = await asyncio.gather(*(ask(http, chat) for _ in range(4)))
        assert all("Paris" in answer["choices"][0]["message"]["content"] for answer in answers)
        assert not response.content.at_eof()
        response.close()


async def test_client_that_leaves_ends_the_generation(chat: Served, http: aiohttp.ClientSession) -> None:
    essay = {"messages": ESSAY, "max_tokens": 8000, "stream": True}
    async with http.post(f"{chat.url}/v1/chat/completions", json=essay) as response:
        await response.content.readline()
        response.close()
    used = cpu_ticks(chat.pid)
    quiet_since = time.monotonic()

    def quiet() -> bool:
        nonlocal used, quiet_since
        if (now := cpu_ticks(chat.pid)) != used:
            used, quiet_since = now, time.monotonic()
        return time.monotonic() - quiet_since > 0.5  # a token takes a fiftieth of that

    await until(quiet, "the engine is idle again")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": QUESTION, "temperature": "hot"}, "temperature"),
        ({"messages": QUESTION, "max_tokens": 1.5}, "max_tokens"),
        ({"messages": QUESTION, "stop": [1]}, "stop"),
        ({"messages": QUESTION, "n": 2}, "n"),
        ({"messages": QUESTION, "tools": [{}]}, "tools"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages"),
    ],
)
async def test_a_wrong_request_is_told_its_field(chat: Served, http: aiohttp.ClientSession, body: dict[str, Any], param: str) -> None:
    async with http.post(f"{chat.url}/v1/chat/completions", json=body) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


async def test_openai_client_chats(chat: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{chat.url}/v1", api_key="none") as client:
        (model,) = (await client.models.list()).data
        whole = await client.chat.completions.create(model=model.id, messages=QUESTION, max_tokens=24)  # type: ignore[arg-type]
        text = ""
        async for event in await client.chat.completions.create(model=model.id, messages=QUESTION, max_tokens=24, stream=True):  # type: ignore[arg-type]
            text += event.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content


async def test_openai_client_embeds(embeddings: Served) -> None:
    """Similarities as the model's authors publish them for these sentences, so the graph is theirs."""
    sentences = {
        "A man is eating pasta.": 1.0,
        "A man is eating food.": 0.7035,
        "A man is eating a piece of bread.": 0.5272,
        "A man is riding a horse.": 0.1889,
        "A man is riding a white horse on an enclosed ground.": 0.1047,
        "A cheetah is running behind its prey.": 0.0980,
    }
    async with openai.AsyncOpenAI(base_url=f"{embeddings.url}/v1", api_key="none") as client:
        packed = await client.embeddings.create(model="any", input=list(sentences))
        plain = await client.embeddings.create(model="any", input=list(sentences), encoding_format="float")
    vectors = [one.embedding for one in packed.data]
    assert vectors == [pytest.approx(one.embedding, abs=1e-7) for one in plain.data]
    similar = [sum(a * b for a, b in zip(vectors[0], vector, strict=True)) for vector in vectors]
    assert similar == pytest.approx(list(sentences.values()), abs=1e-4)


async def test_embeddings_are_the_same_again(embeddings: Served, http: aiohttp.ClientSession) -> None:
    async def embed(given: object) -> list[list[float]]:
        async with http.post(f"{embeddings.url}/v1/embeddings", json={"input": given}) as response:
            assert response.status == 200, await response.text()
            return [one["embedding"] for one in (await response.json())["data"]]

    texts = ["a short one", "and one that is quite a bit longer than the other, to be padded"]
    assert await embed(texts) == await embed(texts)
    assert (await embed(texts[0]))[0] == pytest.approx((await embed(texts))[0], abs=1e-5)
    assert len((await embed("word " * 1000))[0]) == 384


@pytest.mark.parametrize("body", [{}, {"input": ""}, {"input": []}, {"input": [1, 2]}, {"input": "x", "dimensions": 3}])
async def test_a_wrong_text_is_refused(embeddings: Served, http: aiohttp.ClientSession, body: dict[str, Any]) -> None:
    async with http.post(f"{embeddings.url}/v1/embeddings", json=body) as response:
        assert response.status == 400


@pytest.mark.parametrize("answer", ["snapshot-complete", "restore-complete"])
async def test_control_directory(tmp_path: Path, http: aiohttp.ClientSession, answer: str) -> None:
    with started("embeddings.py", os.environ | {"SNAPSHOT_CONTROL_DIR": str(tmp_path)}) as engine:
        await until((tmp_path / "ready-for-snapshot").exists, "ready-for-snapshot")
        assert_can_be_dumped(engine.pid)

        async def healthy() -> bool:
            async with http.get(f"{engine.url}/health") as response:
                return response.status == 200

        assert await healthy()
        waking = wake_ups(engine.pid)
        await until(lambda: wake_ups(engine.pid) > waking, "it looks for an answer")
        (tmp_path / ".answer").touch()
        (tmp_path / ".answer").rename(tmp_path / answer)
        since, woken = time.monotonic(), wake_ups(engine.pid)

        def asleep() -> bool:
            nonlocal since, woken
            if (now := wake_ups(engine.pid)) != woken:
                since, woken = time.monotonic(), now
            return time.monotonic() - since > 0.5

        await until(asleep, "it has stopped looking")
        assert await healthy()


def test_chat_engine_can_be_dumped(chat: Served) -> None:
    assert_can_be_dumped(chat.pid)


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def wake_ups(pid: int) -> int:
    """How often the main thread has gone to sleep of its own accord."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
