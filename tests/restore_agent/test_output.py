"""Pipes that an engine prints into: drained, kept for error texts, logged by lines."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
from pathlib import Path

import pytest

from restore_agent.places.output import Pipes, in_short
from tests.worlds.processes import descriptors
from tests.worlds.waiting import until


async def printed(output: Pipes, script: str) -> None:
    with output.writers() as (out, err):
        process = await asyncio.create_subprocess_exec("sh", "-c", script, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    await process.wait()


async def test_the_last_lines_are_kept_and_led_by_the_name() -> None:
    output = Pipes("engine")
    await printed(output, "for i in 1 2 3 4 5 6 7 8 9; do echo line $i; done; printf 'half a line' >&2")
    tail = output.tail().splitlines()
    assert tail[1:] == [f"  engine: line {i}" for i in range(3, 10)] + ["  engine: half a line"]
    output.close()
    assert "half a line" in output.tail(), "also when nothing more is read"


async def test_nothing_printed_is_nothing_said() -> None:
    output = Pipes("engine")
    assert output.tail() == ""
    output.close()


async def test_more_than_a_pipe_holds_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "zerowake.engine")
    output = Pipes("engine")
    await asyncio.wait_for(printed(output, "yes | head -n 100000; echo the end"), 30)
    await until(lambda: "the end" in output.tail())
    assert caplog.messages[-1] == "engine: the end"
    output.close()


async def test_a_line_without_an_end_is_cut() -> None:
    output = Pipes("engine")
    await printed(output, "head -c 1000000 /dev/zero | tr '\\0' x")
    assert len(output.tail()) < 100_000
    output.close()


async def test_an_image_knows_the_pipes_by_what_they_are_called() -> None:
    output = Pipes("engine")
    with output.writers() as fds:
        assert output.keys == tuple(str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in fds)
    output.close()


async def test_a_closed_output_leaves_no_descriptor() -> None:
    before = len(descriptors(os.getpid()))
    for _ in range(3):
        Pipes("never used").close()
        used = Pipes("used")
        await printed(used, "echo x")
        used.close()
    assert len(descriptors(os.getpid())) == before


async def test_the_tail_names_the_exception_that_another_process_had_before() -> None:
    output = Pipes("engine")
    lines = ["core: ValueError: 1024 exceeds 55\r", *(f"server: line {n}" for n in range(20)), "server: RuntimeError: see root cause above"]
    await printed(output, "".join(f"echo '{line}';" for line in lines))
    told = output.tail().splitlines()[1:]
    assert told[0] == "  engine: core: ValueError: 1024 exceeds 55"
    assert told[1:] == [f"  engine: server: line {n}" for n in range(13, 20)] + ["  engine: server: RuntimeError: see root cause above"]
    output.close()


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (
            ["loading", "(EngineCore pid=7) ERROR ValueError: no room", "Traceback", "RuntimeError: see above"],
            "ValueError: no room / RuntimeError: see above",
        ),
        (["KeyError: 'a'", "again", "KeyError: 'a'", "  at last ", ""], "KeyError: 'a'"),
        (["one", "two ", "", "panic: three"], "two / panic: three"),
        ([], ""),
    ],
)
def test_in_one_line_exceptions_count_for_more_than_last_words(printed: list[str], said: str) -> None:
    assert in_short(printed) == said
