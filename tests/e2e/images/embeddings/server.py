"""OpenAI's /v1/embeddings of all-MiniLM-L6-v2, as an ASGI application: `uvicorn server:app --port PORT`. Its threads compute."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sentence_model import NAME, SentenceModel

model = SentenceModel()
pool = ThreadPoolExecutor(4)
turn = asyncio.Lock()  # the model is not for two threads at once


async def app(
    scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]], send: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    if scope["type"] == "lifespan":
        await send({"type": f"{(await receive())['type']}.complete"})
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    answer = {"data": [{"id": NAME, "object": "model"}], "object": "list"} if scope["method"] == "GET" else await embedded(json.loads(body))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


async def embedded(asked: dict[str, Any]) -> dict[str, Any]:
    texts = [asked["input"]] if isinstance(asked["input"], str) else asked["input"]
    async with turn:
        vectors, tokens = await asyncio.get_running_loop().run_in_executor(pool, model.embed, texts)
    data = [{"object": "embedding", "index": at, "embedding": vector.tolist()} for at, vector in enumerate(vectors)]
    return {"object": "list", "data": data, "model": asked.get("model"), "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
