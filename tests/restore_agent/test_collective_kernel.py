"""The kernel by which ranks sum and gather, run on the processor with threads for a GPU's: what it gives to the bit, call after call.

That NVRTC takes the same source, and that GPUs see each other's memory as it wants, needs a GPU: tests/bench/gpu/ranks.py.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restore_agent.workload.vllm import collective_call, collective_kernel, peer_memory
from restore_agent.workload.vllm.collective_call import HEADER, LINES
from restore_agent.workload.vllm.collective_kernel import KernelFailed, compiled
from restore_agent.workload.vllm.peer_memory import Collectives
from tests.worlds.collective_on_processor import Processor, build

HALF, PUSHED = 8192, 1024
Bytes = NDArray[np.uint8]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor(build(tmp_path_factory.mktemp("kernel")))


@pytest.fixture(autouse=True)
def small_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (collective_call, peer_memory):
        monkeypatch.setattr(module, "HALF", HALF)
    monkeypatch.setattr(collective_call, "PUSHED", PUSHED)


class Ranks:
    """Ranks as threads of this process, over memories of its own. `pause`: before each launch of a rank."""

    def __init__(self, processor: Processor, count: int, pause: Callable[[], float] = lambda: 0.0) -> None:
        self.count = count
        self._memories = [aligned(HEADER + 2 * HALF + LINES) for _ in range(count)]

        def launch(call: Any, arguments: Any) -> None:
            time.sleep(pause())
            processor.launch(call, arguments)

        addresses = [memory.ctypes.data for memory in self._memories]
        self._all = [Collectives(addresses, rank, launch) for rank in range(count)]
        self._threads = ThreadPoolExecutor(count)

    def have_called(self, times: int) -> None:
        for memory in self._memories:
            memory[:4].view(np.uint32)[0] = times

    def sum(self, parts: list[Bytes], kind: str) -> list[Bytes]:
        outs = [aligned(part.nbytes) for part in parts]
        return self._each(outs, lambda each, rank, out: each.sum(parts[rank].ctypes.data, out.ctypes.data, out.nbytes, kind))

    def gather(self, parts: list[Bytes]) -> list[Bytes]:
        outs = [aligned(part.nbytes * self.count) for part in parts]
        return self._each(outs, lambda each, rank, out: each.gather(parts[rank].ctypes.data, out.ctypes.data, parts[rank].nbytes))

    def _each(self, outs: list[Bytes], do: Callable[[Collectives, int, Bytes], bool]) -> list[Bytes]:
        assert all(self._threads.map(do, self._all, range(self.count), outs, timeout=30))
        return outs


def aligned(size: int) -> Bytes:
    """Zeros at an address of a vector's alignment."""
    memory = np.zeros(size + 16, dtype=np.uint8)
    begin = -memory.ctypes.data % 16
    return memory[begin : begin + size]


def values(kind: str, size: int, seed: int) -> Bytes:
    """Numbers of any kind, those that are none among them."""
    found = aligned(size)
    numbers = np.random.default_rng(seed).standard_normal(size // 4, dtype=np.float32) * 100
    numbers[::97] = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-40, 6e4, -3e38][seed % 8]
    if kind == "float32":
        found[:] = numbers.view(np.uint8)
    elif kind == "float16":
        with np.errstate(over="ignore"):
            found[:] = np.resize(numbers, size // 2).astype(np.float16).view(np.uint8)
    else:
        found[:] = (np.resize(numbers, size // 2).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return found


def floats(kind: str, data: Bytes) -> NDArray[np.float32]:
    if kind == "float32":
        return data.view(np.float32)
    if kind == "float16":
        return data.view(np.float16).astype(np.float32)
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def reference(kind: str, parts: list[Bytes]) -> NDArray[np.float32]:
    """Added in single precision in the order of the ranks, and rounded once."""
    with np.errstate(all="ignore"):
        total = np.zeros_like(floats(kind, parts[0]))
        for part in parts:
            total = total + floats(kind, part)
        if kind == "float16":
            return total.astype(np.float16).astype(np.float32)
        if kind == "float32":
            return total
        bits = total.view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        return np.where(np.isnan(total), np.float32(np.nan), nearest.astype(np.uint32).view(np.float32))


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("ranks", "size"), [(2, 16), (2, PUSHED), (2, 4000), (2, 3 * HALF + 48), (3, 400), (3, 2000), (4, HALF), (8, 160)])
def test_a_sum_is_the_same_to_the_bit_on_every_rank_and_right(processor: Processor, kind: str, ranks: int, size: int) -> None:
    parts = [values(kind, size, seed) for seed in range(ranks)]
    outs = Ranks(processor, ranks).sum(parts, kind)
    assert len({out.tobytes() for out in outs}) == 1
    np.testing.assert_array_equal(floats(kind, outs[0]), reference(kind, parts))


@pytest.mark.parametrize("size", [16, 48, 2000, HALF, 2 * HALF + 16])
def test_more_than_two_ranks_sum_in_parts_what_is_large(processor: Processor, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("_AT_ONCE", "PUSHED"):
        monkeypatch.setattr(collective_call, limit, 0)
    parts = [values("bfloat16", size, seed) for seed in range(4)]
    outs = Ranks(processor, 4).sum(parts, "bfloat16")
    assert len({out.tobytes() for out in outs}) == 1
    np.testing.assert_array_equal(floats("bfloat16", outs[0]), reference("bfloat16", parts))


@pytest.mark.parametrize(("ranks", "size"), [(2, 16), (2, 2 * HALF + 32), (4, 1008)])
def test_a_gather_is_every_rank_s_bytes_in_their_order(processor: Processor, ranks: int, size: int) -> None:
    parts = [values("float32", size, seed) for seed in range(ranks)]
    for out in Ranks(processor, ranks).gather(parts):
        assert out.tobytes() == b"".join(part.tobytes() for part in parts)


def test_call_after_call_nobody_overtakes_the_others_for_good(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, kinds and ways in turn, each rank late at times: a half that were written again too early would show."""
    monkeypatch.setattr(collective_call, "_AT_ONCE", 2048)
    chance = random.Random(3)
    ranks = Ranks(processor, 3, lambda: chance.choice((0.0, 0.0, 0.002)))
    for number in range(60):
        size = 16 * chance.randint(1, 300)
        parts = [values("bfloat16", size, number + seed) for seed in range(3)]
        if number % 3:
            np.testing.assert_array_equal(floats("bfloat16", ranks.sum(parts, "bfloat16")[number % 2]), reference("bfloat16", parts))
        else:
            assert ranks.gather(parts)[2].tobytes() == b"".join(part.tobytes() for part in parts)


def test_the_number_of_a_call_begins_again(processor: Processor) -> None:
    ranks = Ranks(processor, 2)
    ranks.have_called((1 << 32) - 4)
    for number in range(8):
        size = (16, 512, 4000)[number % 3]
        parts = [values("float32", size, number + seed) for seed in range(2)]
        np.testing.assert_array_equal(floats("float32", ranks.sum(parts, "float32")[number % 2]), reference("float32", parts))


def test_a_first_try_gives_up_on_ranks_that_do_not_come(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    memories = [aligned(HEADER + 2 * HALF + LINES) for _ in range(2)]
    alone = Collectives([memory.ctypes.data for memory in memories], 0, processor.launch, patience=100)
    for pushes in (True, False):
        monkeypatch.setattr(collective_call, "PUSHED", collective_call.PUSHED if pushes else 0)
        mine, out = values("float32", 64, 1), aligned(64)
        assert alone.sum(mine.ctypes.data, out.ctypes.data, 64, "float32"), "it was begun, and it ends"


def test_the_header_is_as_large_as_python_says(processor: Processor) -> None:
    assert processor.header_size == HEADER


class Nvrtc:
    """In for NVRTC. `fails`: at which call."""

    def __init__(self, fails: str = "") -> None:
        self._fails = fails
        self.source = b""

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def called(*arguments: Any) -> tuple[Any, ...]:
            if name == "nvrtcCreateProgram":
                self.source = arguments[0]
            return (SimpleCode(name == self._fails), 3)

        return called


class SimpleCode(int):
    name = "NVRTC_ERROR_COMPILATION"


def test_what_is_compiled_is_the_kernel_and_what_the_compiler_refuses_is_said() -> None:
    nvrtc = Nvrtc()
    compiled(nvrtc, "sm_90")
    assert b"collective(struct peers peers" in nvrtc.source
    with pytest.raises(KernelFailed, match=r"does not compile it for sm_90: NVRTC_ERROR_COMPILATION"):
        compiled(Nvrtc("nvrtcCompileProgram"), "sm_90")


def test_without_nvrtc_it_says_so() -> None:
    def missing(*_: Any) -> Iterator[None]:
        raise RuntimeError("no libnvrtc.so.12")

    with pytest.raises(KernelFailed, match=r"NVRTC cannot be loaded: no libnvrtc\.so\.12"):
        compiled(SimpleNamespace(nvrtcCreateProgram=missing), "sm_90")
    assert collective_kernel.Kernel
