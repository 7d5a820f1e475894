"""An embeddings engine: OpenAI's `/v1/embeddings` of all-MiniLM-L6-v2 on the CPU.

    python deploy/demo/embeddings.py --port 8000

With GPUMEM_SOCKET, its weights lie in a gpumem region of the host, which all of its processes share; for a snapshot it lets go of it.
"""

import asyncio
import base64
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from aiohttp import web

from control import keep_memory_together
from serving import Refused, application, arguments, json_object, serve

keep_memory_together()

from sentence_model import DIMENSIONS, NAME, SentenceModel  # noqa: E402  (its libraries start threads when they are imported)

if TYPE_CHECKING:
    from shared_weights import SharedWeights

MOST_TEXTS = 2048  # in one request, as OpenAI has it


def read_texts(body: dict[str, Any]) -> list[str]:
    """Raises Refused: names the field that is wrong."""
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise Refused("input must be a text or a list of texts, none of them empty; token numbers are not read", "input")
    if len(texts) > MOST_TEXTS:
        raise Refused(f"input has {len(texts)} texts; a request may have {MOST_TEXTS}", "input")
    if body.get("dimensions") not in (None, DIMENSIONS):
        raise Refused(f"dimensions must be {DIMENSIONS}", "dimensions")
    if body.get("encoding_format") not in (None, "float", "base64"):
        raise Refused("encoding_format must be float or base64", "encoding_format")
    return texts


class Embeddings:
    def __init__(self, weights: "SharedWeights | None" = None) -> None:
        self._weights = weights
        self._model = SentenceModel(weights.region if weights else None)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sentence-model")  # in the order of asking
        self._awake = asyncio.Event()
        self._awake.set()

    def is_awake(self) -> bool:
        return self._awake.is_set()

    @asynccontextmanager
    async def asleep(self) -> AsyncIterator[None]:
        """Within it no shared weights are mapped, and requests wait."""
        if not self._weights:
            yield
            return
        loop = asyncio.get_running_loop()
        self._awake.clear()
        await loop.run_in_executor(self._worker, self._weights.let_go)
        yield
        await loop.run_in_executor(self._worker, self._weights.take_again)
        self._awake.set()

    async def warm(self) -> None:
        """One real answer, so that nothing is left to be built after a restore."""
        await self._embed(["Good morning!", "A second, longer text."])

    async def answer(self, request: web.Request) -> web.Response:
        body = await json_object(request)
        vectors, tokens = await self._embed(read_texts(body))
        packed = body.get("encoding_format") == "base64"
        data = [
            {"object": "embedding", "index": i, "embedding": base64.b64encode(vector.tobytes()).decode() if packed else vector.tolist()}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return web.json_response({"object": "list", "data": data, "model": str(body.get("model") or NAME), "usage": usage})

    async def _embed(self, texts: list[str]) -> Any:
        await self._awake.wait()
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._model.embed, texts)


async def main() -> None:
    wanted = arguments("Serves all-MiniLM-L6-v2 with OpenAI's embeddings API.")
    weights = None
    if os.environ.get("GPUMEM_SOCKET"):
        from shared_weights import SharedWeights  # noqa: PLC0415  (what is not imported is in no image)

        weights = SharedWeights()
    embeddings = Embeddings(weights)
    await embeddings.warm()
    app = application(NAME, "/v1/embeddings", embeddings.answer, embeddings.is_awake)
    await serve(app, wanted.host, wanted.port, embeddings.asleep)


if __name__ == "__main__":
    asyncio.run(main())
