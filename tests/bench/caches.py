"""A cold start of a torch engine that compiles its kernels: caches empty, or brought by a snapshot that does not fit; and restored.

It needs a Python with torch and g++: this one, or the one that ENGINE_PYTHON names. On processors TorchInductor compiles C++; what it and
Triton compile for GPUs goes the same way, and takes longer.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from zerowake_proto import agent_pb2 as pb

from restore_agent.snapshots.catalog import Catalog
from restore_agent.snapshots.compile_caches import INDEX
from tests.bench.figures import Figure
from tests.worlds.agent import PORT, get, running

ROUNDS = 3
PYTHON = os.environ.get("ENGINE_PYTHON", sys.executable)
ENGINE = Path(__file__).parents[1] / "worlds" / "torch_compiled_engine.py"


def unavailable() -> str:
    found = subprocess.run([PYTHON, "-c", "import torch"], check=False, capture_output=True)
    return "it needs torch: set ENGINE_PYTHON to a Python that has it" if found.returncode else ""


def engine(caches: Path) -> pb.Engine:
    env = {"PATH": os.environ["PATH"], "HOME": str(caches), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    env |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [PYTHON, str(ENGINE), str(PORT)]
    return pb.Engine(command=command, env=env, directory="/", port=PORT, health_path="/health", ready_timeout_seconds=300)


async def main() -> list[Figure]:
    took: dict[str, list[float]] = {"empty": [], "travelled": [], "restored": []}
    with tempfile.TemporaryDirectory() as folder:
        there, state = Path(folder) / "there", Path(folder) / "state"
        async with running(state) as agent:
            await agent.snapshot("small", engine(there))
            expected = agent.recorded_answer()

            async def timed(kind: str, name: str, **fields: object) -> None:
                begin = time.monotonic()
                answer = await agent.restore(name, **fields)
                if get(answer.replica, "/sum") != expected or (answer.replica.origin == pb.ORIGIN_RESTORED) != (kind == "restored"):
                    raise AssertionError(f"{kind}: {answer}")
                took[kind].append(time.monotonic() - begin)
                await agent.release(answer.replica)

            for _ in range(ROUNDS + 1):  # the first is left out
                await timed("restored", "small")
            snapshot = Catalog(state).get("default", "small")
            index = json.loads((snapshot.directory / INDEX).read_text())
            files = [file for cache in index["caches"] for file in cache["files"]]
            shutil.rmtree(there)  # what the engine maps: its snapshot does not fit any more
            await agent.unstage("small")
            for number in range(ROUNDS + 1):
                await timed("empty", "none", cold=engine(Path(folder) / f"empty-{number}"))
                await timed("travelled", "small", cold=engine(Path(folder) / f"travelled-{number}"))
    medians = {kind: statistics.median(seconds[1:]) for kind, seconds in took.items()}

    def spread(kind: str) -> str:
        return f"{min(took[kind][1:]):.2f} to {max(took[kind][1:]):.2f} of {ROUNDS}; the same answer"

    return [
        Figure("torch.compile, cold: caches empty", medians["empty"], "s", detail=spread("empty")),
        Figure("torch.compile, cold: caches of its snapshot", medians["travelled"], "s", detail=spread("travelled")),
        Figure("torch.compile: restored", medians["restored"], "s", detail=spread("restored")),
        Figure("what the caches save", medians["empty"] - medians["travelled"], "s"),
        Figure("caches in the snapshot", sum(file["size"] for file in files) / 1e6, "MB", detail=f"{len(files)} files"),
    ]
