"""A node: process 1 of its own namespaces. Under the first one the control plane runs, too.

Started by `unshare` with new mount, network, pid, UTS and IPC namespaces. So each node has a network of its own, and /run, /etc and
/var/lib as an ordinary node has them, and nothing to clean up: when this process ends, the kernel ends every process below it, unmounts
what was mounted and removes interfaces, routes and nftables rules. What is left is the state folder and the control groups: `down` removes
them. Rejected: running everything on the machine itself (each path and port collides with something, and a crash leaves all of it behind),
and the cluster's own components as pods (slower to start, and a test could not stop the kubelet or the API server by name).

It speaks with `up` over its standard input and output: its pid as seen outside, then (once `up` has made the network) a line for each step,
`ready` at last. Afterwards it obeys `start`, `stop`, `restart` and `kill` of a component on the control socket. A component that ends by
itself is started again, as systemd or the kubelet would.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

from tests.e2e.cluster import objects
from tests.e2e.cluster.components import Component, components
from tests.e2e.cluster.layout import ARCHIVES, BIN, FIRST, LOGS, OVERLAYFS_MAGIC, Addresses, Member

OVERLAID = ("/etc", "/opt", "/var/lib", "/var/log")
# Straight on the disk: an overlay can't be the upper layer of a container's, and snapshots are read with O_DIRECT.
DIRECT = ("/var/lib/containerd", "/var/lib/kubelet", "/var/lib/zerowake")
# What a kubelet sets for the whole machine. It finds these already so, in a copy that only this node sees.
SYSCTLS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
CGROUPS = Path("/sys/fs/cgroup")
NEEDED_CONTROLLERS = ("cpu", "cpuset", "memory", "pids")  # by a kubelet
PATIENCE_SECONDS = 90.0
MOST_ENDS = 5  # of a program before it was ever up
RESTART_SECONDS = 1.0
STOP_SECONDS = 5.0  # then it is killed: an API server waits a minute for its watches


def main() -> None:
    print(Path("/proc/self").readlink(), flush=True)  # the old /proc: our pid as seen outside
    told = json.loads(sys.stdin.readline())
    addresses, member = Addresses(told["cluster"]), Member(told["node"])
    make_file_systems(addresses, member)
    make_network(addresses, member)
    socket.sethostname(member.name)
    os.environ["PATH"] = f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    if node := os.fork():
        while os.wait()[0] != node:  # the others are orphans, of which process 1 is the parent
            pass
        raise SystemExit(1)
    asyncio.run(Node(addresses, member).run())


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the node could not be prepared: `{' '.join(command)}` says: {done.stderr.strip()}")


def make_file_systems(addresses: Addresses, member: Member) -> None:
    run("mount", "--make-rprivate", "/")
    disk = member.disk
    disk.mkdir(exist_ok=True)
    kind = subprocess.run(["stat", "--file-system", "--format=%t", disk], capture_output=True, text=True, check=True).stdout.strip()
    if kind == OVERLAYFS_MAGIC:  # this "machine" is a container: its root can't be under another overlay's upper layer
        run("mount", "-t", "tmpfs", "-o", "mode=755", "zerowake-node", str(disk))
    for path in OVERLAID:
        upper, work = disk / f"upper{path}", disk / f"work{path}"
        upper.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        run("mount", "-t", "overlay", "-o", f"lowerdir={path},upperdir={upper},workdir={work}", "zerowake-node", path)
    for path in DIRECT:
        Path(path).mkdir(exist_ok=True)
        own = disk / Path(path).name
        own.mkdir(exist_ok=True)
        run("mount", "--bind", str(own), path)
    run("mount", "-t", "tmpfs", "-o", "mode=755", "zerowake-node", "/run")
    run("mount", "-t", "proc", "-o", "nosuid,nodev,noexec", "proc", "/proc")
    # /sys/class/net must show this network's interfaces; the control groups stay the machine's.
    Path("/run/cgroup").mkdir()
    run("mount", "--rbind", "/sys/fs/cgroup", "/run/cgroup")
    run("mount", "-t", "sysfs", "sysfs", "/sys")
    run("mount", "--rbind", "/run/cgroup", "/sys/fs/cgroup")
    run("umount", "--lazy", "/run/cgroup")
    for name, value in SYSCTLS.items():
        copy = Path("/run/sysctl", name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(value + "\n")
        run("mount", "--bind", str(copy), f"/proc/sys/{name}")
    run("mount", "--make-rshared", "/")  # the kubelet's mounts reach its containers
    for hierarchy in cgroups(addresses):
        (hierarchy / member.name).mkdir(exist_ok=True)


def give_controllers(root: Path) -> None:
    """cgroup v2: a group has those controllers that its parent gives to all of its children, and a kubelet wants all that there are.

    The kernel refuses it where processes are in the parent itself, as in a container that is its own machine. There they move into a child
    before; Docker's image for Docker in Docker does the same. Called outside of the node: inside it sees none of these processes.
    """
    if not (root / "cgroup.controllers").exists():
        return
    given = (root / "cgroup.subtree_control").read_text().split()
    for name in (root / "cgroup.controllers").read_text().split():
        if name not in given:
            try:
                give_controller(root, name)
            except OSError as error:
                if name in NEEDED_CONTROLLERS:
                    raise SystemExit(f"the cluster cannot start: {root} does not give {name} to the groups below it: {error}") from None


def give_controller(root: Path, name: str) -> None:
    try:
        append(root / "cgroup.subtree_control", f"+{name}")
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        aside = root / "zerowake-machine"
        aside.mkdir(exist_ok=True)
        for pid in (root / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):  # it has just ended
                append(aside / "cgroup.procs", pid)
        append(root / "cgroup.subtree_control", f"+{name}")


def append(file: Path, words: str) -> None:
    with file.open("a") as opened:
        opened.write(words)


def cgroups(addresses: Addresses) -> list[Path]:
    """The cluster's own group in each hierarchy: one with version 2, a dozen with version 1."""
    roots = [CGROUPS] if (CGROUPS / "cgroup.procs").exists() else [path for path in CGROUPS.iterdir() if not path.is_symlink()]
    return [path / addresses.cgroup.strip("/") for path in roots]


def make_network(addresses: Addresses, member: Member) -> None:
    run("ip", "link", "set", "lo", "up")
    run("ip", "address", "add", f"{addresses.of(member)}/30", "dev", "eth0")
    run("ip", "link", "set", "eth0", "up")
    run("ip", "route", "add", "default", "via", addresses.router(member))
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1\n")


class Running:
    """A component: its process, and the wish that it runs."""

    def __init__(self, component: Component, log: Path) -> None:
        self.component = component
        self.log = log
        self.process: asyncio.subprocess.Process | None = None
        self.wanted = False
        self.ends = 0
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when it answers."""
        if not self.wanted:
            self.wanted, self.ends = True, 0
            await self._spawn()
            self.task = asyncio.create_task(self._keep())
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not await self._up():
            if self.ends >= MOST_ENDS or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise TimeoutError(f"{self.component.name} is not up; it ended {self.ends} times. The end of {self.log}:\n{tail}")
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        self.wanted = False
        if self.process and self.process.returncode is None:
            self.process.terminate()
        if self.task:
            try:
                await asyncio.wait_for(asyncio.shield(self.task), STOP_SECONDS)
            except TimeoutError:
                if self.process and self.process.returncode is None:
                    self.process.kill()
                await self.task
            self.task = None

    async def kill(self) -> None:
        """It stays dead."""
        self.wanted = False
        if self.process and self.process.returncode is None:
            self.process.kill()
        await self.stop()

    async def _keep(self) -> None:
        while self.wanted and self.process:
            status = await self.process.wait()
            if self.wanted:
                self.ends += 1
                with self.log.open("a") as log:
                    log.write(f"--- {self.component.name} ended with status {status}; it is started again\n")
                await asyncio.sleep(RESTART_SECONDS)
                await self._spawn()

    async def _spawn(self) -> None:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.component.command,
                env={**os.environ, **self.component.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def _up(self) -> bool:
        if not self.process or self.process.returncode is not None:
            return False
        return await asyncio.to_thread(answers, self.component.probe)


def answers(probe: str) -> bool:
    if not probe.startswith("http"):
        with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
            client.connect(probe)
            return True
        return False
    anybody = ssl.create_default_context()
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(probe, timeout=2, context=anybody):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


def first(errors: BaseException) -> BaseException:
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors


class Node:
    def __init__(self, addresses: Addresses, member: Member) -> None:
        self._member = member
        self._api = f"{addresses.api}/readyz"
        self._every = {name: Running(one, member.log(name)) for name, one in components(addresses, member).items()}

    async def run(self) -> None:
        LOGS.mkdir(exist_ok=True)
        try:
            await (self._start() if self._member == FIRST else self._join())
        except* Exception as errors:
            print(f"failed {json.dumps(str(first(errors)))}", flush=True)
            raise SystemExit(1) from None
        server = await asyncio.start_unix_server(self._obey, self._member.control)
        print("ready", flush=True)
        await server.serve_forever()

    async def _start(self) -> None:
        """The first one, and with it the cluster."""
        async with asyncio.TaskGroup() as group:
            runtime = group.create_task(self._runtime())
            await self._steps("etcd", "kube-apiserver")
            await runtime
            rest = ("kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "coredns")
            for name in rest:
                group.create_task(self._steps(name))
            await self._step("KEDA's resources", objects.apply())
            group.create_task(self._steps("keda-operator", "keda-adapter"))
        await self._step("the node and KEDA's metrics", objects.ready(self._member.name))

    async def _join(self) -> None:
        """Another one. Its kubelet begins when there is something to join: after a refusal it would wait for seconds."""
        await self._runtime()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not await asyncio.to_thread(answers, self._api):
            if time.monotonic() > deadline:
                raise TimeoutError(f"there is no API server at {self._api}")
            await asyncio.sleep(0.2)
        await asyncio.gather(self._steps("kube-proxy"), self._steps("kubelet"))
        await self._step("the node", objects.node_ready(self._member.name))

    async def _runtime(self) -> None:
        await self._steps("containerd")
        await self._step("the pause image", objects.import_image(ARCHIVES / "pause.tar"))

    async def _steps(self, *names: str) -> None:
        for name in names:
            await self._step(name, self._every[name].start())

    async def _step(self, label: str, work: Awaitable[None]) -> None:
        began = time.monotonic()
        await work
        where = "" if self._member == FIRST else f"{self._member.name}: "
        print(f"  {where}{label}: up in {time.monotonic() - began:.1f} s", flush=True)

    async def _obey(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One line, `VERB COMPONENT`; the answer is `ok`, or what went wrong."""
        verb, _, name = (await reader.readline()).decode().strip().partition(" ")
        answer = "ok"
        try:
            one = self._every[name]
            if verb == "kill":
                await one.kill()
            if verb in ("stop", "restart"):
                await one.stop()
            if verb in ("start", "restart"):
                await one.start()
        except KeyError:
            answer = f"there is no component {name!r}: there are {', '.join(self._every)}"
        except TimeoutError as error:
            answer = str(error)
        writer.write(answer.encode())
        writer.close()


if __name__ == "__main__":
    main()
