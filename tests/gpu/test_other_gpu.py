"""A process that sees one GPU, as in a container, wakes on another one, whose device file is there in its place. Needs two GPUs.

What is asked of the driver here: pairs that name the GPUs of the process's own /dev, and none of the others that the machine has.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from restore_agent.drivers.cuda import Cuda, CudaError
from tests.worlds.needs import missing_for_criu

ENGINE = """
import sys, torch
kept = torch.arange(1 << 20, device="cuda")
print("ready", flush=True)
for line in sys.stdin:
    print(int(kept.sum()), torch.cuda.device_count(), flush=True)
"""
SUM = str((1 << 20) * ((1 << 20) - 1) // 2)
# Another /dev, with the files that CUDA opens and one GPU's. FOLDER/old is the machine's.
HIDES = """
set -e
mkdir "$1/old" "$1/new"
mount --rbind /dev "$1/old"
mount -t tmpfs tmpfs "$1/new"
for name in null zero full random urandom tty nvidiactl nvidia-uvm nvidia-uvm-tools "nvidia$2"; do
    [ -e "/dev/$name" ] || continue
    touch "$1/new/$name"
    mount --bind "/dev/$name" "$1/new/$name"
done
mount --rbind "$1/new" /dev
shift 2
exec "$@"
"""
SWAPS = 'set -e; umount "/dev/nvidia$2"; rm "/dev/nvidia$2"; touch "/dev/nvidia$3"; mount --bind "$1/old/nvidia$3" "/dev/nvidia$3"'


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    pytest.importorskip("torch")
    if missing := missing_for_criu():
        pytest.skip(missing)
    found = Cuda.find()
    if found is None or len(found.known) < 2 or found.gpus().names[0] != found.gpus().names[1]:
        pytest.skip("needs two GPUs of one model")
    return found


@pytest.fixture
def engine(cuda: Cuda, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    hides = ["unshare", "--mount", "bash", "-c", HIDES, "bash", str(tmp_path), str(cuda.known[0].minor)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*hides, sys.executable, "-c", ENGINE], **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


async def said(engine: subprocess.Popen[str], word: str = "") -> str:
    assert engine.stdin and engine.stdout
    if word:
        engine.stdin.write(f"{word}\n")
        engine.stdin.flush()
    return (await asyncio.wait_for(asyncio.to_thread(engine.stdout.readline), 120)).strip()


@pytest.mark.gpu
async def test_it_wakes_on_the_gpu_whose_file_is_there(cuda: Cuda, engine: subprocess.Popen[str], tmp_path: Path) -> None:
    first, second = cuda.known[:2]
    assert await said(engine) == "ready"
    assert await said(engine, "?") == f"{SUM} 1"
    assert cuda.holders([engine.pid]) == [engine.pid]
    freed = await cuda.suspend([engine.pid], {first.uuid})
    assert freed.keys() == {first.uuid}
    swaps = [
        "nsenter",
        f"--target={engine.pid}",
        "--mount",
        "bash",
        "-c",
        SWAPS,
        "bash",
        str(tmp_path),
        str(first.minor),
        str(second.minor),
    ]
    await asyncio.to_thread(subprocess.run, swaps, check=True)
    before = cuda.free()
    await cuda.resume([engine.pid], {first.uuid: second.uuid})
    taken = {uuid: size - cuda.free()[uuid] for uuid, size in before.items()}
    assert taken[second.uuid] > freed[first.uuid] // 2 > taken[first.uuid], taken
    assert (await said(engine, "?")).split()[0] == SUM


@pytest.mark.gpu
async def test_a_gpu_whose_file_is_not_there_strands_it(cuda: Cuda, engine: subprocess.Popen[str]) -> None:
    """Which is why the agent looks at the files first (restore_agent/kubernetes/pod_gpus.py)."""
    first, second = cuda.known[:2]
    assert await said(engine) == "ready"
    await cuda.suspend([engine.pid])
    with pytest.raises(CudaError):
        await cuda.resume([engine.pid], {first.uuid: second.uuid})
