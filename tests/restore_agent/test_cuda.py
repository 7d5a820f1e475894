"""Processes that hold GPUs together are suspended and resumed together, or not at all: on a stand-in of the driver that knows its states.

The driver itself: tests/gpu/.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from restore_agent.drivers import cuda as module
from restore_agent.drivers.cuda import Cuda, CudaError, NodeGpu
from tests.worlds import stand_in_driver
from tests.worlds.cuda_driver import CHECKPOINTED, LOCKED, NOT_READY, OK, OPERATING_SYSTEM, OUT_OF_MEMORY, RUNNING, Driver, Nvml
from tests.worlds.ports import free_port
from tests.worlds.waiting import until

UUIDS = [f"GPU-{uuid.UUID(int=number)}" for number in range(1, 5)]
RANKS = [101, 102, 103]


class World:
    def __init__(self) -> None:
        self.driver = Driver(UUIDS, RANKS)
        self.nvml = Nvml(UUIDS, {(0, 1): 18, (0, 2): -20, (1, 2): -50, (0, 3): -40})
        self.cuda = Cuda(self.driver, self.nvml)

    def refuse(self, step: str, pid: int, code: int) -> None:
        self.driver.before = lambda now, who: code if (now, who) == (step, pid) else OK

    @property
    def states(self) -> set[str]:
        return set(self.driver.states.values())


@pytest.fixture
def world() -> World:
    return World()


async def test_each_step_is_done_to_all_ranks_at_once_and_before_the_next_one(world: World) -> None:
    together = threading.Barrier(len(RANKS), timeout=10)  # nobody passes alone

    def all_here(step: str, pid: int) -> int:
        together.wait()
        return OK

    world.driver.before = all_here
    await world.cuda.suspend(RANKS)
    assert world.states == {CHECKPOINTED}
    await world.cuda.resume(RANKS)
    assert world.states == {RUNNING}
    steps = [step for step, _ in world.driver.said]
    assert steps == [step for step in ("lock", "checkpoint", "restore", "unlock") for _ in RANKS]


@pytest.mark.parametrize(("step", "code"), [("lock", NOT_READY), ("checkpoint", OUT_OF_MEMORY)])
async def test_a_suspend_that_one_rank_refuses_is_undone_for_all(world: World, step: str, code: int) -> None:
    world.refuse(step, 102, code)
    with pytest.raises(CudaError, match=rf"CUDA cannot {step} pid 102.*CUDA_ERROR"):
        await world.cuda.suspend(RANKS)
    assert world.states == {RUNNING}


async def test_none_goes_on_before_all_have_their_state_back_when_a_suspend_is_undone(world: World) -> None:
    world.refuse("checkpoint", 103, OUT_OF_MEMORY)
    with pytest.raises(CudaError):
        await world.cuda.suspend(RANKS)
    undone = [step for step, _ in world.driver.said][2 * len(RANKS) :]
    assert undone == ["restore"] * len(RANKS) + ["unlock"] * len(RANKS)


async def test_a_suspend_that_is_given_up_half_way_is_undone(world: World) -> None:
    reached, go = threading.Event(), threading.Event()

    def slow(step: str, pid: int) -> int:
        if (step, pid) == ("checkpoint", 101):
            reached.set()
            go.wait(10)
        return OK

    world.driver.before = slow
    suspending = asyncio.create_task(world.cuda.suspend(RANKS))
    await asyncio.to_thread(reached.wait, 10)
    suspending.cancel()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await suspending
    assert world.states == {RUNNING}


async def test_a_resume_that_one_rank_refuses_is_the_end_of_all_and_says_so(world: World) -> None:
    await world.cuda.suspend(RANKS)
    world.refuse("restore", 102, OUT_OF_MEMORY)
    with pytest.raises(CudaError, match=r"restore pid 102: CUDA_ERROR_OUT_OF_MEMORY.*all 3 processes of the engine .* are lost with it"):
        await world.cuda.resume(RANKS)
    assert world.driver.states == {101: LOCKED, 102: CHECKPOINTED, 103: LOCKED}, "none has gone on"


async def test_of_a_process_that_has_ended_the_driver_says_little_and_we_say_more(world: World) -> None:
    world.refuse("checkpoint", 102, OPERATING_SYSTEM)
    with pytest.raises(CudaError, match=r"checkpoint pid 102: CUDA_ERROR_OPERATING_SYSTEM; as of a process that ended meanwhile"):
        await world.cuda.suspend(RANKS)


async def test_alone_there_are_no_others_to_be_lost(world: World) -> None:
    await world.cuda.suspend([101])
    world.refuse("restore", 101, OUT_OF_MEMORY)
    with pytest.raises(CudaError) as refused:
        await world.cuda.resume([101])
    assert "processes" not in str(refused.value)


async def test_a_driver_that_does_not_answer_for_one_rank_is_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEP_SECONDS", 0.2)
    go = threading.Event()

    def hangs(step: str, pid: int) -> int:
        if (step, pid) == ("lock", 103):
            go.wait(10)
        return OK

    world.driver.before = hangs
    try:
        with pytest.raises(CudaError, match=r"does not lock pid 103 within 0 s: look for Xid"):
            await world.cuda.suspend(RANKS)
        assert {pid: world.driver.states[pid] for pid in (101, 102)} == {101: RUNNING, 102: RUNNING}
    finally:
        go.set()


async def test_processes_wake_on_other_gpus_in_their_order(world: World) -> None:
    await world.cuda.suspend(RANKS)
    moves = dict(zip(UUIDS, [UUIDS[2], UUIDS[3], UUIDS[0], UUIDS[1]], strict=True))
    await world.cuda.resume(RANKS, moves)
    assert dict(world.driver.pairs) == moves


def test_how_gpus_reach_each_other_is_said_as_nvidia_smi_says_it(world: World) -> None:
    gpus = world.cuda.gpus()
    assert gpus.link(UUIDS[0], UUIDS[1]) == gpus.link(UUIDS[1], UUIDS[0]) == "NV18"
    assert gpus.link(UUIDS[0], UUIDS[2]) == "PXB"
    assert gpus.link(UUIDS[1], UUIDS[2]) == "SYS"
    assert gpus.link(UUIDS[0], UUIDS[3]) == "NODE"
    assert gpus.link(UUIDS[2], UUIDS[3]) == "", "NVML does not say"
    assert gpus.link(UUIDS[0], "GPU-elsewhere") == ""


def test_some_of_the_gpus_are_in_cuda_s_order_and_linked_as_they_are(world: World) -> None:
    some = world.cuda.gpus({UUIDS[2], UUIDS[0], "GPU-elsewhere"})
    assert (some.uuids, len(some.names), some.driver) == ((UUIDS[0], UUIDS[2]), 2, world.cuda.gpus().driver)
    assert some.link(UUIDS[0], UUIDS[2]) == "PXB" and some.link(UUIDS[0], UUIDS[1]) == ""
    assert world.cuda.gpus(()).uuids == ()


def test_gpus_that_are_partitioned_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA shows a slice of one as if it were a GPU, by an UUID that nobody else knows."""

    def unknown(self: Nvml, identity: str) -> int:
        raise Nvml.NVMLError("Not Found")

    monkeypatch.setattr(Nvml, "nvmlDeviceGetHandleByUUID", unknown)
    with pytest.raises(CudaError, match=r"not known by its UUID \(Not Found\); is it partitioned \(MIG\)\? Use whole GPUs"):
        World()


@pytest.mark.parametrize("moves", [{UUIDS[0]: UUIDS[1], UUIDS[1]: UUIDS[1]}, {UUIDS[0]: "GPU-elsewhere"}])
async def test_each_gpu_needs_one_of_its_own(world: World, moves: dict[str, str]) -> None:
    with pytest.raises(CudaError, match=r"GPUs cannot be these: .*; each needs one of this node's own"):
        await world.cuda.resume(RANKS, moves)


# Processes of their own, on GPUs of a driver that does with their device files as CUDA does.
FILES = [
    {"uuid": UUIDS[0], "name": "H100", "minor": 1},
    {"uuid": UUIDS[1], "name": "L4", "minor": 0},
    {"uuid": UUIDS[2], "name": "H100", "minor": 2},
]


@pytest.fixture
def cuda() -> Cuda:
    return Cuda(stand_in_driver.Driver(FILES), stand_in_driver.Nvml(FILES))


def test_each_is_known_by_the_numbers_that_it_goes_by(cuda: Cuda) -> None:
    assert cuda.known == (NodeGpu(UUIDS[0], 0, 1), NodeGpu(UUIDS[1], 1, 0), NodeGpu(UUIDS[2], 2, 2))


@pytest.fixture
def engine() -> Iterator[tuple[int, int]]:
    """Pid and port of a process in whose /dev are the GPUs 0 and 1."""
    port = free_port()
    script = (Path(__file__).parents[1] / "worlds/stand_in_engine.py").read_text()
    files = "mount -t tmpfs tmpfs /dev && mknod /dev/nvidia0 c 1 3 && mknod /dev/nvidia1 c 1 3 && mount -t tmpfs tmpfs /tmp"
    command = ["unshare", "--mount", "sh", "-c", f'{files} && exec "$@"', "sh", sys.executable, "-c", script, str(port)]
    with subprocess.Popen(command) as process:
        try:
            yield process.pid, port
        finally:
            process.kill()


async def held(engine: tuple[int, int]) -> list[str]:
    found: list[list[str]] = []

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{engine[1]}/gpu", timeout=5) as answer:
                found[:] = [json.loads(answer.read())["holds"]]
        except OSError:
            return False
        return True

    await until(answers)
    return found[0]


@pytest.mark.usefixtures("needs_criu")  # root, for the /dev of its own
async def test_a_process_is_resumed_on_the_gpu_of_its_pair(cuda: Cuda, engine: tuple[int, int]) -> None:
    pid, _ = engine
    assert await held(engine) == ["/dev/nvidia0"]
    assert cuda.holders([pid, os.getpid()]) == [pid]
    assert cuda.held([pid]) == {UUIDS[1]: 64 << 20}
    freed = await cuda.suspend([pid], {UUIDS[1]})
    assert freed == {UUIDS[1]: 64 << 20} and await held(engine) == []
    await cuda.resume([pid], {UUIDS[1]: UUIDS[0]})
    assert await held(engine) == ["/dev/nvidia1"]
    assert await cuda.suspend([pid], {UUIDS[1]}) == {}, "what comes free on others' GPUs is not this process's"
    await cuda.resume([pid], {UUIDS[0]: UUIDS[0]})
    assert await held(engine) == ["/dev/nvidia1"]


@pytest.mark.usefixtures("needs_criu")
async def test_a_gpu_that_is_not_in_its_container_strands_it(cuda: Cuda, engine: tuple[int, int]) -> None:
    """Which is why that is looked at before anything is restored."""
    await held(engine)
    await cuda.suspend([engine[0]])
    with pytest.raises(CudaError, match=rf"cannot restore pid {engine[0]}"):
        await cuda.resume([engine[0]], {UUIDS[1]: UUIDS[2]})
