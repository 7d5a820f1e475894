"""Tensor parallel over two GPUs, suspended and resumed: `python -m tests.bench.gpu.tensor_parallel`.

Two ranks multiply their halves of a matrix and add them up by NCCL's all_reduce. Both are suspended and resumed by the agent's
drivers/cuda.py, with NCCL kept alive or destroyed before and made anew, and with NCCL's ways to move data switched off one by one. What the
driver says to every call is shown by its own name, and whether the sum after it is the one before. What came through is then taken as a
snapshot by an agent, and restored. Each variant has its own processes, and a deadline: a hang is a finding.

NVLink multicast (NVLS) is off in all of them: CUDA does not checkpoint it. Prints one table and writes
`tests/bench/results/tensor-parallel-GPU.json`. Needs two GPUs and torch; root and CRIU for the last part.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from restore_agent.drivers.cuda import Cuda, CudaError
from restore_agent.workload.control_directory import ControlDirectory
from tests.bench.gpu.results import keep
from tests.worlds.json_answers import json_server

ROOT = Path(__file__).parents[3]
ALWAYS = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
VARIANTS: dict[str, dict[str, str]] = {
    "default": {},
    "CUMEM=0": {"NCCL_CUMEM_ENABLE": "0"},
    "CUMEM=1": {"NCCL_CUMEM_ENABLE": "1"},
    "no P2P": {"NCCL_P2P_DISABLE": "1"},
    "no P2P, CUMEM=0, host CUMEM=0": {"NCCL_P2P_DISABLE": "1", "NCCL_CUMEM_ENABLE": "0", "NCCL_CUMEM_HOST_ENABLE": "0"},
    "no SHM": {"NCCL_SHM_DISABLE": "1"},
    "no P2P, no SHM": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
    "no P2P, no SHM, CUMEM=0": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_CUMEM_ENABLE": "0"},
}
DESTROYED = ("default", "CUMEM=0", "no P2P")  # variants in which NCCL is destroyed, too
ALIVE, ANEW = "alive", "anew"
AT_ONCE = 3  # variants
VARIANT_SECONDS, SNAPSHOT_SECONDS, ANSWER_SECONDS = 45.0, 90.0, 15.0
PORT = 8000
console = Console(width=220)


# A rank: takes orders as JSON lines, answers each with one.


class Rank:
    def __init__(self, rank: int) -> None:
        import torch  # noqa: PLC0415  (only where there are GPUs)

        self._torch: Any = torch
        self._rank = rank
        torch.cuda.set_device(rank)
        made = torch.Generator(device="cuda").manual_seed(3 + rank)
        self._x = torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16, generator=made)
        self._half = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16, generator=made)

    def init(self, store: str) -> str:
        """NCCL's version."""
        torch = self._torch
        torch.distributed.init_process_group(
            "nccl",
            init_method=f"file://{store}",
            rank=self._rank,
            world_size=2,
            device_id=torch.device("cuda", self._rank),
            timeout=datetime.timedelta(seconds=ANSWER_SECONDS),
        )
        self.step()
        return ".".join(map(str, torch.cuda.nccl.version()))

    def step(self) -> str:
        """A digest of the sum."""
        part = (self._x @ self._half).float()
        self._torch.distributed.all_reduce(part)
        return hashlib.sha256(part.cpu().numpy().tobytes()).hexdigest()

    def destroy(self) -> str:
        self._torch.cuda.synchronize()
        self._torch.distributed.destroy_process_group()
        return ""


def rank_main(number: int) -> None:
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        rank = Rank(number)
        answers.write('"ready"\n')
        for line in sys.stdin:
            order, arguments = json.loads(line)
            answers.write(json.dumps(getattr(rank, order)(*arguments)) + "\n")


# One variant, in a process of its own: a line of JSON for everything that it sees, the last one is its result.


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")  # whole, whichever thread
    sys.stdout.flush()


class Recorded:
    """The driver, with every call to its checkpoint told before and after."""

    def __init__(self, driver: Any, ranks: dict[int, int]) -> None:
        self._driver = driver
        self._ranks = ranks

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._driver, name)
        if not name.startswith("cuCheckpointProcess") or name.endswith("GetState"):
            return function

        def called(pid: int, arguments: Any) -> Any:
            step, rank = name.removeprefix("cuCheckpointProcess").lower(), self._ranks.get(pid, pid)
            say(at=f"{step} of rank {rank}")
            began = time.monotonic()
            answer = function(pid, arguments)
            say(step=step, rank=rank, says=answer[0].name, seconds=round(time.monotonic() - began, 3))
            return answer

        return called


async def variant(name: str, nccl: str) -> None:
    with tempfile.TemporaryDirectory(prefix="zerowake-nccl-") as folder:
        env = os.environ | ALWAYS | VARIANTS[name] | {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{folder}/log.%p"}
        command = [sys.executable, "-m", "tests.bench.gpu.tensor_parallel", "rank"]
        pipe = asyncio.subprocess.PIPE
        ranks = [await asyncio.create_subprocess_exec(*command, str(each), env=env, cwd=ROOT, stdin=pipe, stdout=pipe) for each in range(2)]
        say(at="start")
        await both(ranks, None)
        say(at="NCCL's start")
        say(nccl=(await both(ranks, "init", f"{folder}/store1"))[0])
        before = await both(ranks, "step")
        say(ways=ways(Path(folder)))
        cuda = Cuda.find()
        assert cuda
        pids = [rank.pid for rank in ranks]
        cuda._driver = Recorded(cuda._driver, {pid: number for number, pid in enumerate(pids)})
        if nccl == ANEW:
            say(at="NCCL's end")
            await both(ranks, "destroy")
        try:
            began = time.monotonic()
            await cuda.suspend(pids)
            say(suspended=round(time.monotonic() - began, 3))
        except CudaError as error:
            say(refused=str(error))
        else:
            try:
                began = time.monotonic()
                await cuda.resume(pids)
                say(resumed=round(time.monotonic() - began, 3))
            except CudaError as error:
                say(result=f"lost: {error}")
                return
        if nccl == ANEW:
            say(at="NCCL's start after the resume")
            await both(ranks, "init", f"{folder}/store2")
        say(at="the sum after it")
        after = await both(ranks, "step")
        say(result="the same sum" if after == before else "another sum")


async def both(ranks: list[asyncio.subprocess.Process], order: str | None, *arguments: str) -> list[Any]:
    """The ranks' answers to an order, or to none."""
    for rank in ranks:
        assert rank.stdin
        if order:
            rank.stdin.write(json.dumps([order, arguments]).encode() + b"\n")

    async def answer(rank: asyncio.subprocess.Process) -> Any:
        assert rank.stdout
        line = await rank.stdout.readline()
        if not line:
            raise RuntimeError(f"a rank ended with {await rank.wait()} at {order or 'its start'!r}")
        return json.loads(line)

    async with asyncio.timeout(ANSWER_SECONDS if order else VARIANT_SECONDS):
        return list(await asyncio.gather(*map(answer, ranks)))


def ways(folder: Path) -> str:
    """By which of its ways NCCL says that it moves data."""
    text = "".join(path.read_text(errors="replace") for path in folder.glob("log.*"))
    return ", ".join(sorted(set(re.findall(r" via (\S+)", text)))) or "unknown"


# The same two ranks as a model server, for an agent.


def serve(nccl: str) -> None:
    """Rank 0, with rank 1 as its child. `/sum` adds up; asleep, NCCL is alive or not, as told."""
    command = [sys.executable, "-m", "tests.bench.gpu.tensor_parallel", "rank", "1"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    own = Rank(0)

    def ask(order: str, *arguments: str) -> str:
        assert child.stdin and child.stdout
        child.stdin.write(json.dumps([order, arguments]) + "\n")
        child.stdin.flush()
        mine = getattr(own, order)(*arguments)
        theirs = json.loads(child.stdout.readline())
        return str(mine) if order != "step" or mine == theirs else f"{mine} and {theirs}"

    assert child.stdout and json.loads(child.stdout.readline()) == "ready"
    started = False

    def quiesce() -> None:
        nonlocal started
        if not started:
            ask("init", f"/dev/shm/store-{secrets.token_hex(4)}")
            ask("step")
        started = True
        if nccl == ANEW:
            ask("destroy")

    def resume(_: Any) -> None:
        if nccl == ANEW:
            ask("init", f"/dev/shm/store-{secrets.token_hex(4)}")
        awake.set()

    awake, asking = threading.Event(), threading.Lock()

    def answer(path: str) -> tuple[HTTPStatus, object]:
        body: dict[str, object] = {}
        if path == "/sum":
            awake.wait()
            with asking:
                body = {"sum": ask("step")}
        return HTTPStatus.OK if awake.is_set() else HTTPStatus.SERVICE_UNAVAILABLE, body

    control = ControlDirectory.from_environment()
    assert control
    control.start(quiesce, resume)
    json_server(PORT, answer).serve_forever()


async def snapshot(name: str, nccl: str) -> None:
    from zerowake_proto import agent_pb2 as pb  # noqa: PLC0415  (only the agent's client needs it)

    from restore_agent.snapshots.catalog import Catalog  # noqa: PLC0415
    from tests.worlds.agent import get, running  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="zerowake-nccl-", dir="/var/tmp") as folder:
        kept = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH")
        env = {key: os.environ[key] for key in kept if key in os.environ} | ALWAYS | VARIANTS[name]
        command = [sys.executable, "-m", "tests.bench.gpu.tensor_parallel", "serve", nccl]
        wanted = pb.Engine(command=command, env=env, directory=str(ROOT), port=PORT, health_path="/health", ready_timeout_seconds=60)
        async with running(Path(folder) / "state") as agent:
            say(at="the snapshot")
            taken = await agent.snapshot("pair", wanted)
            say(image=taken.image_bytes >> 20)
            say(at="its restore")
            began = time.monotonic()
            answer = await agent.restore("pair")
            got = await asyncio.to_thread(get, answer.replica, "/sum")
            seconds = time.monotonic() - began
            canary = Catalog(agent.state).get("default", "pair").manifest.canary
            same = "the same sum" if canary and got == json.loads(canary.answer) else "another sum"
            say(resumed=round(seconds, 3))
            say(result=f"started cold: {answer.fallback_detail}" if answer.fallback_detail else f"{same} from a restored replica")


# All of it


async def told(mode: str, name: str, nccl: str, seconds: float) -> dict[str, Any]:
    """What a variant said, put together; what it did not live to say, too."""
    row: dict[str, Any] = {"mode": mode, "variant": name, "nccl": nccl, "steps": []}
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.gpu.tensor_parallel", mode, name, nccl),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        assert process.stdout
        at = ""
        try:
            async with asyncio.timeout(seconds):
                while line := await process.stdout.readline():
                    try:
                        what = json.loads(line)
                    except ValueError:
                        continue  # a library's words
                    at = what.pop("at", at)
                    if "step" in what:
                        row["steps"].append(what)
                    elif "nccl" in what:
                        row["version"] = what["nccl"]
                    else:
                        row |= what
                    if "result" in row:
                        break  # it may hang in the driver yet
        except TimeoutError:
            row.setdefault("result", f"hangs: {at}, given up after {seconds:.0f} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if "result" not in row:
            errors.seek(0)
            last = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()][-1:]
            row["result"] = f"failed at {at}: {' '.join(last)[-300:]}"
    said = "; ".join(f"{each['step']} {each['rank']}: {each['says']}" for each in row["steps"] if each["says"] != "CUDA_SUCCESS")
    console.print(
        f"{mode} {name}, NCCL {nccl}: {row.get('refused', '')} {said or 'driver: all CUDA_SUCCESS'}; {row['result']}", highlight=False
    )
    return row


async def main() -> int:
    cuda = Cuda.find()
    if cuda is None or len(cuda.gpus().uuids) != 2:
        raise SystemExit("needs two NVIDIA GPUs")
    gpus, before = cuda.gpus(), cuda.used()
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(name: str, nccl: str) -> dict[str, Any]:
        async with turn:
            return await told("variant", name, nccl, VARIANT_SECONDS)

    wanted = [(name, ALIVE) for name in VARIANTS] + [(name, ANEW) for name in DESTROYED]
    rows = list(await asyncio.gather(*(one(*each) for each in wanted)))
    came_through = [row for row in rows if row["result"] == "the same sum" and "refused" not in row]
    for nccl in (ANEW, ALIVE):
        if name := next((row["variant"] for row in came_through if row["nccl"] == nccl), ""):
            rows.append(await told("snapshot", name, nccl, SNAPSHOT_SECONDS))
    shown = Table("HOW", "VARIANT", "NCCL", "WAYS", "DRIVER", "OUT s", "BACK s", "AFTER", box=None, pad_edge=False)
    for row in rows:
        refusals = [f"{each['step']} {each['rank']}: {each['says']}" for each in row["steps"] if each["says"] != "CUDA_SUCCESS"]
        numbers = (str(row.get(key, "")) for key in ("suspended", "resumed"))
        shown.add_row(
            row["mode"], row["variant"], row["nccl"], row.get("ways", ""), "; ".join(refusals) or "success", *numbers, row["result"]
        )
    console.print(shown)
    async with asyncio.timeout(30):
        while (left := cuda.used() - before) > 64 << 20:
            await asyncio.sleep(0.1)
    console.print(f"GPU memory left over: {left / 1e6:.0f} MB")
    machine = {"gpus": gpus.names, "driver": gpus.driver}
    path = keep("tensor-parallel-GPU", "python -m tests.bench.gpu.tensor_parallel", machine, rows=rows)
    console.print(f"kept in {path}")
    return 0


PROGRAMS: dict[str, Callable[..., Any]] = {
    "rank": lambda number: rank_main(int(number)),
    "serve": serve,
    "variant": lambda name, nccl: asyncio.run(variant(name, nccl)),
    "snapshot": lambda name, nccl: asyncio.run(snapshot(name, nccl)),
}

if __name__ == "__main__":
    if len(sys.argv) > 1:
        PROGRAMS[sys.argv[1]](*sys.argv[2:])
    else:
        sys.exit(asyncio.run(main()))
