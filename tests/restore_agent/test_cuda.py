"""Processes that hold GPUs together are suspended and resumed together, or not at all: on a stand-in of the driver that knows its states.

The driver itself: tests/gpu/.
"""

from __future__ import annotations

import asyncio
import threading
import uuid

import pytest

from restore_agent.drivers import cuda as module
from restore_agent.drivers.cuda import Cuda, CudaError
from tests.worlds.cuda_driver import CHECKPOINTED, LOCKED, NOT_READY, OK, OUT_OF_MEMORY, RUNNING, Driver, Nvml

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
