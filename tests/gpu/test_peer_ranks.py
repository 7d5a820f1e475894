"""Two ranks on two GPUs sum and gather over each other's memory, by graphs that were captured before CUDA suspended and resumed both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpumem.hardware.devices import devices
from restore_agent.drivers.cuda import Cuda
from restore_agent.workload.vllm.collective_call import HALF
from tests.worlds.device import ROOT, World

pytestmark = pytest.mark.gpu
RANKS, PATIENCE = 2, 60.0
SIZES = (8192, 1 << 20, HALF + (1 << 20))


class Ranks:
    def __init__(self, socket: Path) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "tests.worlds.gpu_rank", str(socket)]
        self._all = [
            subprocess.Popen([*command, str(each), str(RANKS)], stdin=pipe, stdout=pipe, text=True, cwd=ROOT) for each in range(RANKS)
        ]
        self._deadline = threading.Timer(PATIENCE, self.kill)  # ranks that wait for each other wait for ever
        self._deadline.start()
        self._answers()

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self._all]

    def ask(self, order: str, *arguments: Any) -> list[Any]:
        for rank in self._all:
            assert rank.stdin
            rank.stdin.write(json.dumps([order, arguments]) + "\n")
            rank.stdin.flush()
        return self._answers()

    def kill(self) -> None:
        self._deadline.cancel()
        for rank in self._all:
            with contextlib.suppress(ProcessLookupError):
                rank.kill()
            rank.wait()

    def _answers(self) -> list[Any]:
        lines = [rank.stdout.readline() for rank in self._all if rank.stdout]
        assert all(lines), "a rank ended, or they did not find each other in time"
        return [json.loads(line) for line in lines]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    found = devices()
    if len(found) < RANKS:
        pytest.skip(f"needs {RANKS} GPUs")
    world = World(tmp_path, found[0])
    with world.server(devices=tuple(found[:RANKS]), pool=1 << 30, arena=0):
        started = Ranks(world.socket)
        try:
            started.ask("join", started.ask("lend", secrets.token_hex(32)))
            yield started
        finally:
            started.kill()


@pytest.mark.parametrize("size", SIZES)
def test_sums_and_gathers_are_right(ranks: Ranks, size: int) -> None:
    for _ in range(3):
        assert ranks.ask("eager", size) == [True, True]


def test_graphs_go_on_after_cuda_has_suspended_and_resumed_the_ranks(ranks: Ranks) -> None:
    for size in SIZES:
        ranks.ask("capture", str(size), size)
    driver = Cuda.find()
    assert driver
    for _ in range(3):
        for size in SIZES:
            assert ranks.ask("replay", str(size)) == ranks.ask("replay", str(size)) == [True, True]
        ranks.ask("quiesce")
        with asyncio.Runner() as runner:
            runner.run(driver.suspend(ranks.pids))
            runner.run(driver.resume(ranks.pids))
        ranks.ask("resume", secrets.token_hex(32))
    assert ranks.ask("replay", str(SIZES[0])) == [True, True]
    print({size: f"{max(ranks.ask('seconds', size)) * 1e6:.1f} µs" for size in SIZES})
