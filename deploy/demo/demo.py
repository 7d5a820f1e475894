"""From nothing to an answer and back, with real models on this machine: `make demo` runs it.

It starts the chat engine plainly and asks it something, for comparison; takes a snapshot of each engine; serves both with `zerowake up`,
from zero; asks the same question, streamed; sends a burst; and waits until nothing runs any more. Every number is measured in this run, and
what was started cold instead of restored is said, with the reason.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from rich.console import Console

HERE = Path(__file__).parent
CONFIG = HERE / "demo.yaml"
SETTINGS = yaml.safe_load(CONFIG.read_text())
STATE = (HERE / SETTINGS["state"]).resolve()
GATEWAY = f"http://{SETTINGS['listen']}"
UP_LOG = STATE / "up.log"
CHAT, EMBEDDINGS = "smollm2", "minilm"
QUESTION = "Why is the sky blue?"
ANSWER_TOKENS = 60
BURST, TEXTS = 32, 32  # requests, sentences in each
PATIENCE_SECONDS = 120
ZEROWAKE = (sys.executable, "-m", "scaler.programs.cli")

console = Console(highlight=False)


class Failed(Exception):
    """A step of the demo did not come to its end; the message says which and where to look."""


async def main() -> int:
    console.print("\n[bold]zerowake[/]: models that cost nothing until somebody asks\n")
    if os.geteuid() != 0:
        console.print("[yellow]Not root: nothing can be restored here, so everything below is started cold.[/]\n")
    STATE.mkdir(parents=True, exist_ok=True)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_SECONDS)) as http:
        console.print(f"[bold]1[/] The chat engine, started as always, asked: {QUESTION}")
        cold_seconds, cold_answer = await cold_start(http)
        console.print(f"  first token after [bold]{cold_seconds:.2f} s[/]\n")

        console.print("[bold]2[/] A snapshot of each engine")
        for model in (CHAT, EMBEDDINGS):
            await take_snapshot(model)

        async with zerowake_up():
            await until(
                lambda status: all(model["rung"] == "memory" or model["unusable"] for model in status["models"]), "staged snapshots"
            )
            console.print("\n[bold]3[/] Nothing runs. The same question, through the gateway:\n")
            warm_seconds, answer = await ask(http, GATEWAY, show=True)
            status = await read_status()
            phases = status["activations"][0]["phases"]
            console.print(f"\n  first token after [bold]{warm_seconds:.3f} s[/]: {cold_seconds / warm_seconds:.0f} times sooner")
            console.print("  of that, in ms: " + ", ".join(f"{name} {seconds * 1000:.0f}" for name, seconds in phases.items()))
            console.print(
                "  the cold engine's answer, word for word" if answer == cold_answer else "  [red]not the cold engine's answer[/]"
            )
            say_what_was_cold(status)

            await until(lambda status: not status["replicas"], "back at zero")
            console.print(f"\n[bold]4[/] Back at zero. {BURST} requests at once for the embeddings model, {TEXTS} sentences each:")
            await burst(http)

            await until(lambda status: not status["replicas"], "back at zero")
            console.print("\n[bold]5[/] Back at zero: no engine runs.\n")
    console.print(f"To look at it: .venv/bin/zerowake up deploy/demo/demo.yaml, and then http://{SETTINGS['metrics']}/ in a browser\n")
    return 0


async def cold_start(http: aiohttp.ClientSession) -> tuple[float, str]:
    """Seconds from the start of the process to its first token, and the whole answer."""
    began = time.perf_counter()
    engine = await asyncio.create_subprocess_exec(sys.executable, str(HERE / "chat.py"), "--port", "0", stdout=asyncio.subprocess.PIPE)
    try:
        assert engine.stdout is not None
        line = (await engine.stdout.readline()).decode()
        if not line:
            raise Failed(f"the chat engine ended with {await engine.wait()}; what it said stands above")
        ready = time.perf_counter() - began
        first, answer = await ask(http, line.split()[-1])
        return ready + first, answer
    finally:
        if engine.returncode is None:
            engine.terminate()
            await engine.wait()


async def ask(http: aiohttp.ClientSession, url: str, question: str = QUESTION, *, show: bool = False) -> tuple[float, str]:
    """Asks for a streamed answer: seconds until its first token, and its text. `show` writes it as it comes."""
    body = {"model": CHAT, "messages": [{"role": "user", "content": question}], "max_tokens": ANSWER_TOKENS, "stream": True}
    began, first, text = time.perf_counter(), 0.0, ""
    async with http.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise Failed(f"{url} answers {response.status}: {await response.text()} (log: {UP_LOG})")
        async for line in response.content:
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            first = first or time.perf_counter() - began
            piece = json.loads(data)["choices"][0]["delta"].get("content", "")
            text += piece
            if show:
                console.print(piece, end="", style="cyan", markup=False)
    if show:
        console.print()
    return first, text


async def take_snapshot(model: str) -> None:
    """Says so and goes on where it cannot be taken: zerowake then starts the engine cold."""
    section = SETTINGS["models"][model]
    command = [*ZEROWAKE, "snapshot", "create", model, "--replace", "--state", str(STATE), "--directory", str(HERE)]
    command += ["--port", str(section["port"]), "--", *section["command"]]
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait() != 0:
        console.print(f"  [yellow]no snapshot of {model} (why stands above): it will be started cold[/]")


@asynccontextmanager
async def zerowake_up() -> AsyncIterator[None]:
    """`zerowake up` with the demo's file, until the block ends."""
    with UP_LOG.open("w") as log:
        process = await asyncio.create_subprocess_exec(*ZEROWAKE, "up", str(CONFIG), stdout=log, stderr=log)
    answers = asyncio.create_task(until(lambda _: True, "zerowake up"))
    ended = asyncio.create_task(process.wait())
    try:
        await asyncio.wait({answers, ended}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            raise Failed(f"zerowake up ended with {ended.result()}:\n{UP_LOG.read_text()[-2000:]}")
        yield
    finally:
        answers.cancel()
        if not ended.done():
            process.terminate()
        await ended


async def read_status() -> dict[str, Any]:
    """What `zerowake status` shows. Raises aiohttp.ClientError, OSError: zerowake up does not answer."""
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(STATE / "status.sock"))) as session,
        session.get("http://zerowake/") as response,
    ):
        found: dict[str, Any] = await response.json()
        return found


async def until(holds: Callable[[dict[str, Any]], bool], what: str) -> None:
    """Waits until the status is so."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with suppress(aiohttp.ClientError, OSError):
            if holds(await read_status()):
                return
        await asyncio.sleep(0.1)
    raise Failed(f"{what}: not within {PATIENCE_SECONDS} s (log: {UP_LOG})")


async def burst(http: aiohttp.ClientSession) -> None:
    """Many requests at once, for a model with no replica."""
    body = {"model": EMBEDDINGS, "input": [f"Sentence number {i}, which says what all the others say." for i in range(TEXTS)]}

    async def embed() -> tuple[float, str]:
        async with http.post(f"{GATEWAY}/v1/embeddings", json=body) as response:
            if response.status != 200:
                raise Failed(f"{GATEWAY} answers {response.status}: {await response.text()} (log: {UP_LOG})")
            vectors = json.dumps((await response.json())["data"])
        return time.perf_counter() - began, vectors

    replicas = 0

    def count(status: dict[str, Any]) -> bool:
        nonlocal replicas
        replicas = max(replicas, len(status["replicas"]))
        return False

    began = time.perf_counter()
    counting = asyncio.create_task(until(count, "the burst's answers"))
    try:
        answers = await asyncio.gather(*(embed() for _ in range(BURST)))
        status = await read_status()
    finally:
        counting.cancel()
    count(status)
    seconds = [each for each, _ in answers]
    console.print(
        f"  [bold]{replicas} replicas[/] answered: the first answer after {min(seconds):.3f} s, the last after {max(seconds):.3f} s"
    )
    same = len({vectors for _, vectors in answers}) == 1
    console.print("  all answers are the same, number by number" if same else "  [red]the answers differ[/]")
    say_what_was_cold(status)


def say_what_was_cold(status: dict[str, Any]) -> None:
    for replica in status["replicas"]:
        if replica["origin"] != "restored":
            console.print(f"  [yellow]{replica['id']} of {replica['model']} was started {replica['origin']}: {replica['detail']}[/]")


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except Failed as failed:
        console.print(f"\n[red]{failed}[/]")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
