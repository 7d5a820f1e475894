"""What is on the machine when it is quiet, by /proc, the file system and the programs' own figures: what the checker goes by."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.chaos.stack import MODELS, Machine, Stack
from tests.chaos.table import expected
from tests.worlds.processes import below, resident

_PROBE_SECONDS = 60.0
_READY = 2  # sandboxes that stand ready: for what shares the folders of the models, and for what shares none
_BUSY = {"zerowake_held_requests", "zerowake_held_bytes", "zerowake_in_flight_requests"}  # what is zero when nobody asks


async def silent(stack: Stack, run: str) -> list[str]:
    """Models of machines that do not answer, though everything is well; each may take its time to come back."""

    async def ask(session: aiohttp.ClientSession, machine: Machine, model: str) -> str:
        last, identity = "", f"probe-{run}"
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                while True:
                    with contextlib.suppress(aiohttp.ClientError, OSError):
                        url = f"http://127.0.0.1:{machine.ports['gateway']}/models/{model}/answer?id={identity}"
                        async with session.get(url) as response:
                            text = await response.text()
                            if response.status == 200 and json.loads(text)["answer"] == expected(model, identity):
                                return ""
                            last = f"{response.status} {text[:300]}"
                    await asyncio.sleep(0.3)  # as a client that tries again
        except TimeoutError:
            return f"{model} of machine {machine.name} has not answered for {_PROBE_SECONDS:.0f} s; at last: {last or 'nothing'}"

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        found = await asyncio.gather(*(ask(session, machine, model) for machine in stack.machines.values() for model in MODELS))
    return [each for each in found if each]


def waits_for(stack: Stack) -> list[str]:
    """Snapshots that machines have not yet."""
    models = [model for model in MODELS if model != "cold"]
    return [
        f"{model} of {each.name}"
        for each in stack.machines.values()
        for model in models
        if not (each.state / "names/default" / model).exists()
    ]


async def left_over(stack: Stack) -> list[str]:
    """What is there beside what waits for the next request."""
    found = []
    known = set()
    for machine in stack.machines.values():
        known |= {machine.service.pid, machine.agent_pid()}
        found += [f"machine {machine.name}: {each}" for each in _of_machine(machine, known)]
    for name in ("gpumem", "s3"):
        pid = stack.services[name].pid
        known |= {pid, *(child for _, child, _ in below(pid))}
    for pid in map(int, (stack.pids / "cgroup.procs").read_text().split()):
        if pid not in known:
            found.append(f"process {pid}: {_words(pid)!r}")
    found += [f"mount {line}" for line in _mounts(Path("/proc/self/mounts"), stack.folder) if "/state ext4" not in line]
    found += await _of_gpumem(stack)
    found += await _of_gateways(stack)
    return found


def _of_machine(machine: Machine, known: set[int]) -> Iterator[str]:
    agent = machine.agent_pid()
    if not agent:
        yield "no agent"
        return
    there = [(pid, words) for _, pid, words in below(agent)]
    known |= {pid for pid, _ in there}
    sandboxes = len(
        {_pid_namespace(pid) for pid, words in there if "sandbox-init" in words.split(" ")[0]} - {_pid_namespace(os.getpid()), ""}
    )
    engines = Counter(words.split()[3] for _, words in there if "chaos/engine.py" in words)
    holding = sum("criu" in words.split(" ")[0] for _, words in there)
    if holding > engines["stand"]:  # it holds the tasks of a standby that was restored ahead
        yield f"CRIU still runs, {holding} times"
    if engines - Counter({"stand": 1}):
        yield f"engines that nobody asked for: {dict(engines)}"
    if sandboxes > _READY + sum(engines.values()):
        yield f"{sandboxes} sandboxes, for {sum(engines.values())} engines and {_READY} that are ready"
    others = [words for _, words in there if not any(each in words for each in ("sandbox-init", "chaos/engine.py", "criu"))]
    if others:
        yield f"processes below the agent: {others}"
    for name in ("tmp", "arriving"):
        if names := _names(machine.state / name):
            yield f"files in {name}: {names}"
    layers = _names(machine.state / "layers")
    if len(layers) > sandboxes:
        yield f"{len(layers)} layers for {sandboxes} sandboxes"
    mounts = list(_mounts(Path(f"/proc/{agent}/mounts"), machine.state))
    if len(mounts) > 2:  # the state folder, and the agent's memory in it
        yield f"mounts of the agent: {mounts}"
    yield from _of_chunks(machine.state)


def _of_chunks(state: Path) -> Iterator[str]:
    named: set[str] = set()
    digests = {link.readlink().name for link in (state / "names").glob("*/*") if link.is_symlink()}
    for folder in (state / "snapshots").glob("*/"):
        if folder.name not in digests:
            yield f"snapshot {folder.name} without a name"
            continue
        try:
            named |= {each["hash"] for each in _dicts(json.loads((folder / "manifest.json").read_bytes())) if "hash" in each}
        except ValueError:
            yield f"the manifest of {folder.name} cannot be read"
    there = {path.name for path in (state / "chunks").glob("*/*")}
    if left := there - named:
        yield f"{len(left)} chunks that no snapshot needs: {sorted(left)[:3]}"


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _dicts(each)


async def _of_gpumem(stack: Stack) -> list[str]:
    """By its own figures, as an operator reads them."""
    command = [str(Path(sys.executable).with_name("gpumem")), "status", f"--socket={stack.socket}", "-o", "json"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = await process.communicate()
    if process.returncode:
        return [f"gpumem does not say what it has: {err.decode()[-300:]}"]
    return [f"a lease of gpumem: {each}" for each in _dicts(json.loads(out)) if each.get("leases") or "lease" in each]


async def _of_gateways(stack: Stack) -> list[str]:
    """By what they show to Prometheus."""
    found = []
    async with aiohttp.ClientSession() as session:
        for machine in stack.machines.values():
            try:
                async with session.get(f"http://127.0.0.1:{machine.ports['scaler']}/metrics") as response:
                    text = await response.text()
            except (aiohttp.ClientError, OSError) as error:
                found.append(f"machine {machine.name} shows no metrics: {error}")
                continue
            for line in text.splitlines():
                name, _, value = line.rpartition(" ")
                if name.partition("{")[0] in _BUSY and float(value):
                    found.append(f"machine {machine.name}: {line}")
    return found


def programs(stack: Stack) -> dict[str, dict[str, int]]:
    """Memory and descriptors of what runs for long, by name and pid."""
    pids = {f"{machine.name}'s agent": machine.agent_pid() for machine in stack.machines.values()}
    pids |= {name: service.pid for name, service in stack.services.items() if name != "s3"}
    pids |= {f"gpumem's filler {pid}": pid for _, pid, _ in below(stack.services["gpumem"].pid)}
    found = {}
    for name, pid in pids.items():
        with contextlib.suppress(OSError):
            found[f"{name} {pid}"] = {"bytes": resident(pid), "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir()))}
    return found


def _pid_namespace(pid: int) -> str:
    """Empty: it has ended."""
    with contextlib.suppress(OSError):
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    return ""


def _words(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    return ""


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(path.name for path in folder.iterdir())
    return []


def _mounts(table: Path, folder: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield from (line for line in table.read_text().splitlines() if str(folder) in line)
