"""The cluster of pods.py: started where none runs, its node with GPUs to give, and what it says when something goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from rich.console import Console

from tests.bench.gpu.prepared import MODELS, Machine
from tests.e2e.api import Api
from tests.e2e.cluster.control import enter, running
from tests.e2e.cluster.gpus import KIND, describe_to_node
from tests.e2e.cluster.layout import LOGS, NODE
from tests.e2e.release import Release

ROOT = Path(__file__).parents[3]
SYSTEM = "zerowake"  # its namespace
console = Console(width=220)


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """The one that runs; else one of a single node, for as long as the block lasts."""
    if running():
        yield
        return
    subprocess.run([sys.executable, "-m", "tests.e2e.cluster", "up", "1"], check=True, cwd=ROOT)
    try:
        yield
    finally:
        subprocess.run([sys.executable, "-m", "tests.e2e.cluster", "down"], check=True, cwd=ROOT)


@contextlib.asynccontextmanager
async def gpus_on_node(api: Api, machine: Machine) -> AsyncIterator[None]:
    """The node has the resource nvidia.com/gpu, and what gives a container the GPU that it was promised."""
    program, folder = ROOT / "tests/e2e/device_plugin.py", "/var/lib/kubelet/device-plugins"
    plugin = [*enter(own_processes=False), sys.executable, str(program), folder, KIND]
    devices = ["host"]  # as gpumem calls the host's memory
    if machine.gpus:
        devices = list(machine.gpus.nodes)
        describe_to_node(machine.gpus.specification(machine.root))
        plugin.append(f"--cdi={KIND}")
    process = await asyncio.create_subprocess_exec(*plugin, *devices)
    try:
        await api.until("Node", "", NODE, lambda one: one and one["status"]["allocatable"].get(KIND) == str(len(devices)))
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def gpumem_answers(installed: Release) -> None:
    """It pins its arena before it listens, which takes seconds. What it says is shown."""
    words = ["kubectl", "-n", SYSTEM, "exec", "daemonset/zerowake-agent", "-c", "gpumem", "--", "gpumem", "status"]
    async with asyncio.timeout(120):
        while True:
            try:
                console.print((await installed.run(*words)).rstrip(), markup=False)
                return
            except AssertionError:  # kubectl's exit status
                await asyncio.sleep(0.5)


def kubectl(*words: str) -> list[str]:
    return [*enter(), "kubectl", *words]


def tell_all() -> None:
    """What the cluster knows of a failure, and the ends of its programs' logs into OUT."""
    for words in (
        ("get", "pods,modelsnapshots,scaledobjects,deployments", "-A", "-o", "wide"),
        ("get", "events", "-A", "--sort-by=.lastTimestamp"),
        ("-n", MODELS, "describe", "modelsnapshots"),
        ("-n", MODELS, "logs", "--all-containers", "--prefix", "--tail=60", "--selector=!nothing"),
        ("-n", SYSTEM, "logs", "--all-containers", "--prefix", "--tail=60", "--selector=app.kubernetes.io/name=zerowake-agent"),
    ):
        done = subprocess.run(kubectl(*words), capture_output=True, text=True, check=False, timeout=60)
        console.print(f"--- kubectl {' '.join(words)}\n{(done.stdout + done.stderr)[-7000:]}", markup=False, highlight=False)


def keep_logs() -> None:
    if out := os.environ.get("OUT"):
        for log in LOGS.glob("*.log"):
            Path(out, log.name).write_bytes(log.read_bytes()[-400_000:])
        words = ("-n", SYSTEM, "logs", "--all-containers", "--tail=4000", "--selector=app.kubernetes.io/name=zerowake-agent")
        done = subprocess.run(kubectl(*words), capture_output=True, text=True, check=False, timeout=60)
        Path(out, "agent.log").write_text(done.stdout[-400_000:])
