"""OpenAI's own client against the gateway."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest

from tests.worlds.echo_engine import Engine
from tests.worlds.front import front


@asynccontextmanager
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as made:
        yield made


async def test_openais_client_through_a_scale_from_zero() -> None:
    message = [{"role": "user", "content": "one two three"}]
    async with Engine() as engine, front() as f, client(f.url) as api:
        assert [model.id async for model in api.models.list()] == ["m"]
        plain = asyncio.create_task(api.chat.completions.create(model="m", messages=message))  # type: ignore[call-overload]
        stream = asyncio.create_task(api.chat.completions.create(model="m", messages=message, stream=True))  # type: ignore[call-overload]
        await f.held(2)
        f.dispatcher.add(engine.replica())
        assert (await plain).choices[0].message.content == "one two three"
        assert [piece.choices[0].delta.content async for piece in await stream] == ["one", "two", "three"]
        with pytest.raises(openai.NotFoundError, match="model 'nope' is not known"):
            await api.chat.completions.create(model="nope", messages=message)  # type: ignore[call-overload]
        f.dispatcher.remove("r1")
        f.ledger.declare("m", type(f.ledger.limits("m"))(max_wait_seconds=0.05))
        with pytest.raises(openai.InternalServerError, match="no replica of model 'm' was free"):
            await api.chat.completions.create(model="m", messages=message)  # type: ignore[call-overload]


async def test_openais_client_cancelled_half_way() -> None:
    message = [{"role": "user", "content": "one two three"}]
    async with Engine(held=True) as engine, front() as f, client(f.url) as api:
        f.dispatcher.add(engine.replica())
        engine.say()
        async with asyncio.timeout(10):
            stream = await api.chat.completions.create(model="m", messages=message, stream=True)  # type: ignore[call-overload]
            async for piece in stream:
                assert piece.choices[0].delta.content == "one"
                break
            await stream.close()
            assert await engine.left.get() == "one two three"
        await f.until(lambda demand: demand.pending == 0)


async def test_audio_images_and_files_of_openais_client() -> None:
    """What it sends as a form: the model is one of its fields."""
    async with Engine() as engine, front() as f, client(f.url) as api:
        f.dispatcher.add(engine.replica())
        sound = ("speech.wav", b"RIFF" * 1000, "audio/wav")
        await api.audio.transcriptions.with_raw_response.create(model="m", file=sound)
        await api.audio.translations.with_raw_response.create(model="m", file=sound)
        await api.images.with_raw_response.edit(model="m", image=("x.png", b"PNG", "image/png"), prompt="x")
        for path in ("transcriptions", "translations", "edits"):
            assert engine.seen.get_nowait().endswith(path)
        with pytest.raises(openai.BadRequestError, match="X-Zerowake-Model"):
            await api.files.create(file=sound, purpose="assistants")
        await api.files.with_raw_response.create(file=sound, purpose="assistants", extra_headers={"X-Zerowake-Model": "m"})
        with pytest.raises(openai.BadRequestError, match="names no model"):
            await api.files.delete("file-1")
        with pytest.raises(openai.APIStatusError, match="can be read only"):
            await api.models.delete("m")
