"""What an engine's process does without while it sleeps, on a GPU: graphs compute the same when it is back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from restore_agent.workload.context_memory import Stacks, Workspaces  # noqa: E402

MIB = 1 << 20
# Each thread keeps 8 KiB on its stack, so CUDA raises what each has.
HUNGRY = """
extern "C" __global__ void hungry(float *out) {
    volatile float kept[2048];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    for (int j = 0; j < 2048; j++) kept[(j * 7 + i) & 2047] = i + j;
    float sum = 0;
    for (int j = 0; j < 2048; j++) sum += kept[(j * 13 + i) & 2047];
    out[i] = sum;
}
"""


@pytest.fixture
def used() -> Callable[[], int]:
    """Bytes of the GPU in use."""
    if not torch.cuda.is_available():
        pytest.skip("about a GPU")
    torch.cuda.init()

    def ask() -> int:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    return ask


def hungry(out: Any) -> None:
    torch.cuda._compile_kernel(HUNGRY, "hungry")(grid=(out.numel() // 128, 1, 1), block=(128, 1, 1), args=(out,))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["usual", "hungry"])
def test_graphs_compute_the_same_with_their_stacks_back(used: Callable[[], int], kernel: str) -> None:
    x, weight = torch.randn(64, 512, device="cuda"), torch.randn(512, 512, device="cuda")
    out = torch.zeros(64 * 512, device="cuda")

    def compute() -> None:
        out.copy_(torch.sort(x @ weight, -1)[0].view(-1))
        if kernel == "hungry":
            hungry(out)

    compute()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    graph.replay()
    expected, stacks = out.clone(), Stacks()
    assert expected.any()
    for _ in range(3):
        before = used()
        size = stacks.let_go()
        assert stacks.let_go() == size, "they are gone already"
        assert size > (1000 * MIB if kernel == "hungry" else 100 * MIB)
        assert abs(before - used() - size) < 8 * MIB
        stacks.take_back()
        assert abs(used() - before) < 8 * MIB
        stacks.take_back()
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_graphs_keep_their_workspaces_and_what_was_computed_without_graphs_loses_its_own(used: Callable[[], int]) -> None:
    workspaces = Workspaces()
    workspaces.let_go()
    workspaces.keep_apart()
    workspaces.keep_apart()
    x, weight = (torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.mm(x, weight)
    side.synchronize()
    out = torch.empty_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        torch.mm(x, weight, out=out)
    graph.replay()
    expected = torch.mm(x, weight)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    workspaces.let_go()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before - 8 * MIB
    taken = torch.full((256 * MIB,), 7, dtype=torch.uint8, device="cuda")  # what was let go of is somebody else's now
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected) and torch.equal(torch.mm(x, weight), expected)
    assert bool((taken == 7).all()), "the graph wrote to nobody else's memory"


def test_without_a_gpu_there_is_nothing_to_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Stacks().take_back()
    workspaces = Workspaces()
    workspaces.keep_apart()
    workspaces.let_go()
