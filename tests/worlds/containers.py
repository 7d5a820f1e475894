"""Containers as a kubelet would have them made: runc, an overlay root, own namespaces and cgroups, few rights; pid 1 is the placeholder.

Their image (image.py) is written once, with `imaged`, within which there can be containers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restore_agent.kubernetes.seccomp import profile
from restore_agent.places.placeholder import Placeholder, listening
from tests.worlds.image import write_image

# What containerd gives a container, but for what the tests' server has no use for.
CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_NET_BIND_SERVICE", "CAP_MKNOD"]


@dataclass
class Running:
    """A running container and what its placeholder's output was."""

    name: str
    folder: Path
    runc: asyncio.subprocess.Process

    @property
    def upper(self) -> Path:
        return self.folder / "upper"

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["runc", *command], capture_output=True, text=True, check=True)

    def execute(self, *command: str) -> str:
        """A command of its tenant's, as by `kubectl exec`."""
        return self.run("exec", self.name, *command).stdout

    def pid(self) -> int:
        """Of its pid 1, on this machine."""
        pid: int = json.loads(self.run("state", self.name).stdout)["pid"]
        return pid

    def kill(self, number: str = "TERM") -> None:
        self.run("kill", self.name, number)

    async def exit_code(self) -> int:
        return await asyncio.wait_for(self.runc.wait(), 20)

    def log(self) -> str:
        return (self.folder / "log").read_text()


class Callers:
    """The placeholders that have called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waiting: asyncio.Queue[Placeholder] = asyncio.Queue()

    async def called(self, placeholder: Placeholder) -> None:
        await self.waiting.put(placeholder)

    async def next(self) -> Placeholder:
        return await asyncio.wait_for(self.waiting.get(), 20)


@contextlib.asynccontextmanager
async def answering(folder: Path) -> AsyncIterator[Callers]:
    callers = Callers(folder)
    async with listening(folder, callers.called):
        yield callers
        while not callers.waiting.empty():
            callers.waiting.get_nowait().close()


@dataclass(frozen=True)
class Asked:
    """What a pod asks for its container."""

    user: int = 0
    groups: Sequence[int] = ()
    capabilities: Sequence[str] = tuple(CAPABILITIES)
    shared: Sequence[str] = ()  # namespaces that it has none of its own of
    memory: int = 0  # its limit, bytes; 0: none
    bare: bool = False  # its command is its pid 1
    filtered: bool = True  # under the agent's seccomp profile, as pods are
    read_only: bool = False  # its root
    empty_dirs: Sequence[str] = ()  # where a fresh one is mounted
    env: Sequence[str] = ()  # beside what every container has
    mounts: Sequence[dict[str, Any]] = ()  # the same; as runc takes them
    address: str = ""  # its pod's, which the host's name is known by


@contextlib.asynccontextmanager
async def container(
    folder: Path, placeholder: Path, command: Sequence[str] = ("sleep", "60"), *, name: str = "", **asked: Any
) -> AsyncIterator[Running]:
    """`placeholder`: the agent's folder. `asked`: see Asked."""
    name = name or f"zerowake-test-{secrets.token_hex(4)}"
    folder.mkdir()
    with _root(folder):
        async with _run(name, folder, placeholder, command, Asked(**asked)) as running:
            yield running
    folder.rmdir()
    left = subprocess.run(["runc", "list", "-q"], capture_output=True, text=True, check=True).stdout
    assert name not in left.split(), "a test leaves no container"


_images: list[Path] = []  # the one that there is


@contextlib.contextmanager
def imaged(folder: Path) -> Iterator[None]:
    """Containers have an image, which lies in `folder`."""
    with _tmpfs(folder):
        write_image(folder)
        _images.append(folder)
        try:
            yield
        finally:
            _images.clear()


@contextlib.contextmanager
def _root(folder: Path) -> Iterator[None]:
    """In `folder`: the image, and what is written over it."""
    (image,) = _images
    with _tmpfs(folder):
        for part in ("upper/run/zerowake/control", "upper/run/zerowake/bin", "work", "root", "control"):
            (folder / part).mkdir(parents=True)
        (folder / "control").chmod(0o777)
        layers = f"lowerdir={image},upperdir={folder / 'upper'},workdir={folder / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(folder / "root")], check=True)
        yield
        subprocess.run(["umount", str(folder / "root")], check=True)


@contextlib.contextmanager
def _tmpfs(folder: Path) -> Iterator[None]:
    """A layer must be on no overlay, and nobody knows what the folder itself is on."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.asynccontextmanager
async def _run(name: str, folder: Path, placeholder: Path, command: Sequence[str], asked: Asked) -> AsyncIterator[Running]:
    specification = _specification(name, folder, placeholder, command, asked)
    (folder / "config.json").write_text(json.dumps(specification))
    log = (folder / "log").open("wb")
    reader, writer = os.pipe()
    drain = await asyncio.create_subprocess_exec("cat", stdin=reader, stdout=log)
    os.close(reader)
    try:
        process = await asyncio.create_subprocess_exec(
            "runc", "run", "--bundle", str(folder), name, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer
        )
        os.close(writer)
        running = Running(name, folder, process)
        if "network" not in asked.shared:
            await _network_up(running, asked.address)
        yield running
    finally:
        subprocess.run(["runc", "delete", "--force", name], capture_output=True, check=False)
        for child in (process, drain):
            await asyncio.wait_for(child.wait(), 20)
        log.close()


async def _network_up(running: Running, address: str) -> None:
    async with asyncio.timeout(20):
        while True:
            state = subprocess.run(["runc", "state", running.name], capture_output=True, text=True, check=False)
            if state.returncode == 0 and (about := json.loads(state.stdout))["status"] == "running" and not _is_runc(pid := about["pid"]):
                break
            await asyncio.sleep(0.01)  # runc tells nobody when it has started
    for words in ("link set lo up", *([f"address add {address} dev lo"] if address else [])):
        subprocess.run(["nsenter", "-t", str(pid), "-n", "ip", *words.split()], check=True)


def _is_runc(pid: int) -> bool:
    """Whether it is about to become the container's program: runc calls it running by then, and an agent would take it for another's."""
    return Path(f"/proc/{pid}/comm").read_text().startswith("runc:")


def _specification(name: str, folder: Path, placeholder: Path, command: Sequence[str], asked: Asked) -> dict[str, object]:
    for path in asked.empty_dirs:
        (folder / "volumes" / path.strip("/")).mkdir(parents=True)
        (folder / "volumes" / path.strip("/")).chmod(0o777)
    kinds = [kind for kind in ("pid", "network", "ipc", "uts", "mount") if kind not in asked.shared]
    resources: dict[str, object] = {"devices": [{"allow": False, "access": "rwm"}]}
    if asked.memory:
        resources["memory"] = {"limit": asked.memory}
    tmpfs = ["nosuid", "nodev", "mode=1777"]
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{asked.address} {name[:63]}\n" if asked.address else "")
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": asked.user, "gid": asked.user, "additionalGids": list(asked.groups)},
            "args": [*command] if asked.bare else ["/run/zerowake/bin/zerowake-placeholder", "--", *command],
            "env": [f"PATH={os.environ['PATH']}", "SNAPSHOT_CONTROL_DIR=/run/zerowake/control", *asked.env],
            "cwd": "/",
            "capabilities": {kind: list(asked.capabilities) for kind in ("bounding", "effective", "permitted")},
            "noNewPrivileges": True,
        },
        "root": {"path": str(folder / "root"), "readonly": asked.read_only},
        **({} if "uts" in asked.shared else {"hostname": name[:63]}),
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": tmpfs},
            {"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "ro"]},
            {"destination": "/run/zerowake/control", "type": "bind", "source": str(folder / "control"), "options": ["bind", "rw"]},
            {"destination": "/run/zerowake/bin", "type": "bind", "source": str(placeholder), "options": ["bind", "ro"]},
            *(
                {"destination": path, "type": "bind", "source": str(folder / "volumes" / path.strip("/")), "options": ["bind", "rw"]}
                for path in asked.empty_dirs
            ),
            {"destination": "/etc/hosts", "type": "bind", "source": str(hosts), "options": ["bind", "ro"]},
            *asked.mounts,
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in kinds],
            "resources": resources,
            "cgroupsPath": f"/zerowake-test/{name}",
            **({"seccomp": profile()} if asked.filtered else {}),
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }
