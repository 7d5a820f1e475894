"""The processes of the fault run: two machines (each a `zerowake up` with its agent), gpumem, an S3 server, and who starts them again.

Each machine has a state folder on a small disk of its own, and all of them have one bucket, whose connection a proxy can spoil.
Whatever ends is started again, as a service manager does it; what ended without having been hit is told in the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.chaos.disk import mounted
from tests.chaos.journal import append
from tests.chaos.proxy import Proxy
from tests.chaos.table import SIZE
from tests.chaos.wires import between
from tests.worlds.ports import free_port
from tests.worlds.s3_server import _PROGRAM as S3_PROGRAM
from tests.worlds.s3_server import KEY, SECRET
from tests.worlds.wrong_clock import WrongClock

ROOT = Path(__file__).parents[2]
ENGINE = Path(__file__).with_name("engine.py")
_PLANTED = Path(__file__).with_name("planted")
PORT = 8000
MODELS = ("quick", "stand", "lent", "cold")
# A program of a forked process of ours would first run what gRPC does in a child.
_IN_GROUPS = "sh", "-c", 'echo $$ >"$0" && echo $$ >"$1" && shift && exec "$@"'
_AGAIN_SECONDS = 0.3
_NO_LIMIT = 1 << 60  # bytes of memory
_POOL = 96 << 20


@dataclass
class Service:
    """One process that is started again whenever it ends. hit: it was killed or hindered since it was started, so it may end."""

    name: str
    command: list[str]
    env: dict[str, str]
    log: Path
    memory: Path  # the group of it and of all that it starts
    process: asyncio.subprocess.Process | None = None
    hit: bool = False
    starts: int = 0

    @property
    def pid(self) -> int:
        return self.process.pid if self.process and self.process.returncode is None else 0


@dataclass
class Machine:
    """A state folder, and where its parts listen."""

    name: str
    folder: Path
    ports: dict[str, int]
    service: Service = field(init=False)
    wire: Proxy = field(default_factory=lambda: Proxy(0))  # to its agent

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def phases(self) -> Path:
        """Names of phases as they begin."""
        return self.folder / "phases"

    def agent_pid(self) -> int:
        """0: there is none now."""
        with contextlib.suppress(OSError, StopIteration):
            children = Path(f"/proc/{self.service.pid}/task/{self.service.pid}/children").read_text().split()
            return next(int(pid) for pid in children if b"\0agent\0" in Path(f"/proc/{pid}/cmdline").read_bytes())
        return 0


class Stack:
    """All of it, in `folder`. plant: the bug that is planted in the product, or empty."""

    def __init__(self, folder: Path, plant: str = "") -> None:
        self.folder = folder
        self.journal = folder / "stack.jsonl"
        self.engines = folder / "engines"
        self.socket = folder / "gpumem/gpumem.sock"
        self.plant = plant
        self.services: dict[str, Service] = {}
        self.machines: dict[str, Machine] = {}
        self.proxy = Proxy(0)
        self.pids = Path(f"/sys/fs/cgroup/pids/zerowake-chaos-{os.getpid()}")  # every process of the stack is in it, and none besides
        self.memory = Path(f"/sys/fs/cgroup/memory/zerowake-chaos-{os.getpid()}")  # has one of each service
        self._stack = contextlib.AsyncExitStack()
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = False

    async def __aenter__(self) -> Stack:
        shutil.rmtree(self.folder / "s3", ignore_errors=True)  # its snapshots are signed by keys of a run that was ended
        for each in (
            self.engines,
            self.folder / "gpumem",
            self.folder / "s3/root/fleet",
            self.folder / "s3/meta",
            self.folder / "s3/users",
        ):
            each.mkdir(parents=True, exist_ok=True)
        self._write_weights()
        self.clock = WrongClock(self.folder)
        self.pids.mkdir()
        self.memory.mkdir()
        s3 = free_port()
        self.proxy.target = s3
        await self._stack.enter_async_context(self.proxy.laid())
        self._declare("s3", [str(S3_PROGRAM), "--access", KEY, "--secret", SECRET, "--port", f"127.0.0.1:{s3}", "--keep-alive", "--quiet",
                      "--iam-dir", str(self.folder / "s3/users"), "posix", "--sidecar", str(self.folder / "s3/meta"),
                      str(self.folder / "s3/root")])  # fmt: skip
        gpumem = str(Path(sys.executable).with_name("gpumem"))
        self._declare(
            "gpumem", [gpumem, "serve", f"--socket={self.socket}", f"--reserve={_POOL}", "--arena=0", "--floor=0", "--device=host"]
        )
        for name in ("one", "two"):
            machine = self._make_machine(name)
            await self._stack.enter_async_context(between(machine.state / "agent.sock", machine.wire))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()
        await self._stack.aclose()
        for machine in self.machines.values():
            subprocess.run(["umount", "--lazy", machine.state], check=False)
        with contextlib.suppress(OSError):
            self.pids.rmdir()
            for service in self.services.values():
                service.memory.rmdir()
            self.memory.rmdir()

    def begin(self, *names: str) -> None:
        """Starts services, all of them unless they are named, and has them started again from now on."""
        for name in names or self.services:
            self._keepers.append(asyncio.create_task(self._keep(self.services[name])))

    async def end(self) -> None:
        """As an operator does: SIGTERM, to the machines first."""
        self._stopping = True
        for name in (*self.machines, "gpumem", "s3"):
            service = self.services[name]
            if service.process and service.process.returncode is None:
                service.process.terminate()
                try:
                    await asyncio.wait_for(service.process.wait(), 40)
                except TimeoutError:
                    append(self.journal, what="did not end", service=name)
                    service.process.kill()
                    await service.process.wait()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def run(self, *command: str, machine: str = "one") -> str:
        """`zerowake …` as an operator types it. Raises RuntimeError: what it said."""
        state = str(self.machines[machine].state)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "scaler.programs.cli", *command, "--state", state), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd=ROOT, env=self._environment(),
        )  # fmt: skip
        out, err = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"zerowake {' '.join(command)}: {err.decode()}")
        return out.decode()

    async def trust_each_other(self) -> None:
        """Each machine takes what the other has signed."""
        for name in self.machines:
            await self.run("key", "make", machine=name)
        for name, other in (("one", "two"), ("two", "one")):
            public = next(line.split()[-1] for line in (await self.run("key", "list", machine=name)).splitlines() if "signs" in line)
            await self.run("key", "trust", public, machine=other)

    def engine(self, model: str) -> list[str]:
        """The command of its engine."""
        return [sys.executable, str(ENGINE), str(PORT), model, str(self.engines / "journal.jsonl")]

    async def _keep(self, service: Service) -> None:
        while not self._stopping:
            # One that is started meanwhile is hindered, too.
            limited = (self.pids / "pids.max").read_text().strip() != "max" or _limit(service) < _NO_LIMIT
            service.hit, service.starts = limited, service.starts + 1
            with service.log.open("ab") as log:
                service.process = await asyncio.create_subprocess_exec(
                    *_IN_GROUPS, str(self.pids / "cgroup.procs"), str(service.memory / "cgroup.procs"), *service.command,
                    stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=service.env, cwd=ROOT,
                )  # fmt: skip
            append(self.journal, what="started", service=service.name, pid=service.process.pid)
            code = await service.process.wait()
            append(self.journal, what="ended", service=service.name, code=code, hit=service.hit, stopping=self._stopping)
            await asyncio.sleep(_AGAIN_SECONDS)

    def _declare(self, name: str, command: list[str], **env: str) -> Service:
        memory = self.memory / name
        memory.mkdir()
        service = Service(name, command, self._environment() | env, self.folder / f"{name}.log", memory)
        self.services[name] = service
        return service

    def _environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG", "TMPDIR")}
        kept |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1", "GPUMEM_SOCKET": str(self.socket)}
        if self.plant:
            kept |= {"PYTHONPATH": str(_PLANTED), "ZEROWAKE_CHAOS_PLANT": self.plant}
        return kept | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}"}

    def _make_machine(self, name: str) -> Machine:
        ports = {each: free_port() for each in ("gateway", "scaler", "agent", "keda")}
        machine = Machine(name, self.folder / name, ports)
        mounted(machine.state)
        file = machine.folder / "up.yaml"
        addresses = {"listen": "gateway", "metrics": "scaler", "agent_metrics": "agent"}
        settings: dict[str, Any] = {key: f"127.0.0.1:{ports[each]}" for key, each in addresses.items()}
        settings |= {"keda": {"listen": f"127.0.0.1:{ports['keda']}"}, "state": str(machine.state), "store": "s3://fleet/models"}
        settings |= {"drain_seconds": 5, "models": {model: self._section(model, name) for model in MODELS}}
        file.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "scaler.programs.cli", "up", str(file)]
        tells = {"PYTHONPATH": str(_PLANTED), "ZEROWAKE_CHAOS_PHASES": str(machine.phases)}
        machine.service = self._declare(name, command, **self.clock.env, **tells)
        self.machines[name] = machine
        return machine

    def _section(self, model: str, machine: str) -> dict[str, Any]:
        command = self.engine(model)
        section: dict[str, Any] = {"command": command, "port": PORT, "canary": "/sum", "directory": "/", "env": {}}
        section |= {"shared": [str(self.engines), str(self.folder / "gpumem")], "max_wait_seconds": 25, "ready_seconds": 25}
        section |= {"cooldown_seconds": 1.0, "polling_seconds": 0.2, "stabilisation_seconds": 1.0, "concurrency": 3, "max_replicas": 2}
        if model == "lent":
            command.append(str(self.folder / "weights"))
            section["env"] = {"GPUMEM_SOCKET": str(self.socket)}
        if model != "cold":
            section["snapshot"] = model
        if model == "stand":
            section["stage"] = "standby"
        if model == "quick" and machine == "two":
            section["stage"] = "disk"
        return section

    def _write_weights(self) -> None:
        """The table of the model `lent` as a checkpoint."""
        folder = self.folder / "weights"
        folder.mkdir(exist_ok=True)
        header = json.dumps({"table": {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}}).encode()
        header += b" " * (-len(header) % 8)
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + random.Random("lent").randbytes(SIZE))


def _limit(service: Service) -> int:
    """Bytes of memory that its group may have."""
    return int((service.memory / "memory.limit_in_bytes").read_text())


def signalled(pid: int, number: signal.Signals) -> bool:
    """Whether there was somebody to tell."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return pid > 0
