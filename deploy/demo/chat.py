"""A chat engine: OpenAI's `/v1/chat/completions` of a real, small language model on the CPU.

    python deploy/demo/chat.py --port 8000

Greedy unless a temperature is given. The status line is sent with the first token, not before: the first byte means that work was done.
"""

import asyncio
import codecs
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from control import keep_memory_together
from serving import Refused, application, arguments, json_object, serve

keep_memory_together()

from language_model import CONTEXT_TOKENS, NAME, LanguageModel, Token  # noqa: E402  (its libraries start threads when they are imported)

DEFAULT_TOKENS = 512
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Question:
    """A checked request body."""

    model: str
    messages: list[dict[str, str]]
    stops: tuple[str, ...]
    max_tokens: int
    options: dict[str, Any]  # sampling, in the library's names
    stream: bool
    include_usage: bool
    log_probabilities: bool


@dataclass
class Piece:
    """One token, and the text that is certain with it: no half character, no beginning of a stop string."""

    token: Token
    text: str
    finish: str | None


def number(body: dict[str, Any], key: str, low: float, high: float) -> float | None:
    value = body.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Refused(f"{key} must be a number from {low:g} to {high:g}", key)
    return value


def whole(body: dict[str, Any], key: str, low: int, high: int) -> int | None:
    value = number(body, key, low, high)
    if isinstance(value, float):
        raise Refused(f"{key} must be a whole number", key)
    return value


def plain_text(content: object) -> str:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        raise Refused("content must be a text, or a list of text parts: this model reads nothing else", "messages")
    return "".join(part["text"] for part in parts)


def read_messages(body: dict[str, Any]) -> list[dict[str, str]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list with at least one message", "messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Refused(f"each message needs a role out of {', '.join(ROLES)}", "messages")
    return [{"role": ROLES[message["role"]], "content": plain_text(message.get("content"))} for message in messages]


def read_question(body: dict[str, Any]) -> Question:
    """Raises Refused: names the field that is wrong."""
    if body.get("n") not in (None, 1):
        raise Refused("n must be 1", "n")
    if body.get("tools"):
        raise Refused("this model has no tools", "tools")
    stop = body.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise Refused("stop must be a text or a list of texts", "stop")
    options: dict[str, Any] = {}
    if temperature := number(body, "temperature", 0, 2):
        options |= {"do_sample": True, "temperature": temperature}
        if (top_p := number(body, "top_p", 0, 1)) is not None:
            options["top_p"] = top_p
    if (seed := whole(body, "seed", -(2**63), 2**63)) is not None:
        options["rng_seed"] = seed % 2**31
    for penalty in ("presence_penalty", "frequency_penalty"):
        if (value := number(body, penalty, -2, 2)) is not None:
            options[penalty] = value
    limit = whole(body, "max_completion_tokens", 1, CONTEXT_TOKENS) or whole(body, "max_tokens", 1, CONTEXT_TOKENS)
    return Question(
        model=str(body.get("model") or NAME),
        messages=read_messages(body),
        stops=tuple(stops),
        max_tokens=limit or DEFAULT_TOKENS,
        options=options,
        stream=bool(body.get("stream")),
        include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        log_probabilities=bool(body.get("logprobs")),
    )


async def pieces(tokens: AsyncIterator[Token], stops: tuple[str, ...]) -> AsyncGenerator[Piece]:
    """Turns tokens into text that will not change any more; ends at a stop string, which is not part of it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    held = ""
    async for token in tokens:
        held += decoder.decode(token.text, final=token.finish is not None)
        ends = [at for stop in stops if (at := held.find(stop)) >= 0]
        if ends:
            yield Piece(token, held[: min(ends)], "stop")
            return
        # The longest end of the text that could be the beginning of a stop string waits for the next token.
        waiting = 0 if token.finish else max((n for stop in stops for n in range(len(stop)) if held.endswith(stop[:n])), default=0)
        sure = len(held) - waiting
        yield Piece(token, held[:sure], token.finish)
        held = held[sure:]


def log_probabilities(tokens: list[Token]) -> dict[str, Any]:
    shown = [token for token in tokens if token.text]  # control tokens are no part of the answer
    return {
        "content": [
            {
                "token": token.text.decode(errors="replace"),
                "logprob": token.log_probability,
                "bytes": list(token.text),
                "top_logprobs": [],
            }
            for token in shown
        ]
    }


def event(data: object) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data, separators=(",", ":")).encode()) + b"\n\n"


class Chat:
    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    async def warm(self) -> None:
        """One short real answer: what the library builds at its first use is built before a snapshot is taken."""
        question = read_question({"messages": [{"role": "user", "content": "Good morning!"}], "max_tokens": 4})
        async for _ in self._model.generate(self._model.prompt(question.messages), max_new_tokens=question.max_tokens):
            pass

    async def answer(self, request: web.Request) -> web.StreamResponse:
        question = read_question(await json_object(request))
        prompt = self._model.prompt(question.messages)
        prompt_tokens = prompt.shape[1]
        if prompt_tokens >= CONTEXT_TOKENS:
            raise Refused(
                f"the messages have {prompt_tokens} tokens, the model reads {CONTEXT_TOKENS}", "messages", "context_length_exceeded"
            )
        limit = min(question.max_tokens, CONTEXT_TOKENS - prompt_tokens)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": question.model}
        async with (
            aclosing(self._model.generate(prompt, max_new_tokens=limit, **question.options)) as tokens,
            aclosing(pieces(tokens, question.stops)) as made,
        ):
            if question.stream:
                return await self._stream(request, question, made, head, prompt_tokens)
            return await self._whole(question, made, head, prompt_tokens)

    async def _whole(self, question: Question, made: AsyncIterator[Piece], head: dict[str, Any], prompt_tokens: int) -> web.Response:
        text, tokens, finish = "", [], None
        async for piece in made:
            text += piece.text
            tokens.append(piece.token)
            finish = piece.finish
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": log_probabilities(tokens) if question.log_probabilities else None,
            "finish_reason": finish,
        }
        return web.json_response(head | {"object": "chat.completion", "choices": [choice], "usage": usage(prompt_tokens, len(tokens))})

    async def _stream(
        self, request: web.Request, question: Question, made: AsyncIterator[Piece], head: dict[str, Any], prompt_tokens: int
    ) -> web.StreamResponse:
        head |= {"object": "chat.completion.chunk"}
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        count = 0
        delta: dict[str, str] = {"role": "assistant"}
        async for piece in made:
            count += 1
            if not response.prepared:
                await response.prepare(request)
            if piece.text or piece.finish or question.log_probabilities:
                delta["content"] = piece.text
                choice = {
                    "index": 0,
                    "delta": delta,
                    "logprobs": log_probabilities([piece.token]) if question.log_probabilities else None,
                    "finish_reason": piece.finish,
                }
                await response.write(event(head | {"choices": [choice]}))
                delta = {}
        if question.include_usage:
            await response.write(event(head | {"choices": [], "usage": usage(prompt_tokens, count)}))
        await response.write(event(b"[DONE]"))
        return response


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}


async def main() -> None:
    wanted = arguments("Serves SmolLM2-135M-Instruct with OpenAI's chat API.")
    chat = Chat(LanguageModel())
    await chat.warm()
    await serve(application(NAME, "/v1/chat/completions", chat.answer), wanted.host, wanted.port)


if __name__ == "__main__":
    asyncio.run(main())
