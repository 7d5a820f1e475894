"""CRIU, driven through `criu swrk`: one request over a seqpacket socket, notifications answered on the way. The only file that runs it.

swrk is what libcriu uses. Against the command line it saves the scripts' processes, needs no pidfile, and lets the restored process
be init's child (`rst_sibling`), so that its exit code is not lost. CRIU runs inside the place, so it sees no foreign namespaces: none
are dumped, none restored. The network is not locked: in a net namespace of its own every peer is frozen with the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerowake_proto import criu_pb2

from restore_agent.drivers import criu_log
from restore_agent.errors import AgentError
from restore_agent.places.output import Pipes
from restore_agent.places.place import Place
from restore_agent.places.processes import status

OLDEST = (4, 2)
_GHOST_LIMIT = 1 << 30  # bytes of a deleted file that is still open: they are in the image, and written at each restore
_LOG_LEVEL = 2  # errors and warnings; 4 costs tens of milliseconds
_KDAT = "criu.kdat"
_CAP_SYS_RESOURCE = 1 << 24
# Its folder of plugins is an empty one that nobody can write into, so that CRIU loads no plugin.
_ENVIRONMENT = {"PATH": os.environ.get("PATH", ""), "CRIU_LIBS_DIR": "/proc/self/fdinfo"}


class CriuError(AgentError):
    """CRIU refused or failed; the text says why, what to do, and where its log is."""

    reason = "criu-failed"


@dataclass
class Criu:
    """The CRIU of this node."""

    path: str
    version: str  # "4.2.1"
    probed: bytes = b""  # what it found out about this kernel; nothing: it has not been kept
    log: Path | None = None  # where what it logged of failures is kept

    @classmethod
    def find(cls) -> Criu:
        """Beside this interpreter first (where `make` puts it), then on PATH.

        Raises:
            CriuError: none, or too old; says what to do.
        """
        path = shutil.which("criu", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if path is None:
            raise CriuError("no `criu` beside this Python or on PATH; `make` builds one, or install CRIU 4.2 or later")
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
        found = re.search(r"Version: (\d+)\.(\d+)(\.\d+)?", answer)
        if not found:
            raise CriuError(f"{path} --version says {answer.strip()!r}, which is no CRIU")
        if (int(found[1]), int(found[2])) < OLDEST:
            raise CriuError(f"{path} is CRIU {found[0].removeprefix('Version: ')}; zerowake needs 4.2 or later")
        return cls(path, found[0].removeprefix("Version: "))

    def check(self) -> str:
        """What `criu check` misses on this kernel, in its own words; empty: nothing. Raises CriuError: it does not end."""
        command = [self.path, "--no-default-config", "check"]
        try:
            with tempfile.TemporaryDirectory() as folder:  # it leaves what it found of the kernel where it stands
                done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=folder)
        except subprocess.TimeoutExpired:
            raise CriuError(f"{self.path} check does not end; look at this machine's kernel log (dmesg)") from None
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("Error")]
        return " ".join(said or [f"exit code {done.returncode}"]) if done.returncode else ""

    async def probe(self, place: Place, kdat: Path) -> None:
        """Lets CRIU look at this kernel once and keeps what it found in `kdat`: each later start saves 40 ms.

        Raises:
            CriuError: CRIU does not work here.
        """
        async with Worker.start(self, place, {}) as worker:
            await worker.call(criu_pb2.Request(type=criu_pb2.FEATURE_CHECK, features=criu_pb2.Features()))
        with contextlib.suppress(FileNotFoundError):
            self.probed = await asyncio.to_thread((place.root / "run" / _KDAT).read_bytes)
            await asyncio.to_thread(kdat.write_bytes, self.probed)

    async def dump(self, place: Place, pid: int, images: Path, deadline: float, on_dumped: Callable[[], Awaitable[None]]) -> None:
        """Writes the process tree under `pid` (as seen inside) into `images`, and leaves it running, whatever happens.

        Calls `on_dumped` while every task still waits: then, and not after it, the files are there that CRIU linked for what has no name.

        Raises:
            CriuError: CRIU refused; the engine goes on serving.
            Exception: what `on_dumped` raised.
        """
        _check_limits_readable(host for pid, host in place.host_pids().items() if pid != 1)
        async with Worker.start(self, place, {}, images) as worker, asyncio.timeout(deadline):
            _lay_probe(worker.probed, images)  # it would try out mounts below /tmp, which a read-only root refuses
            options = _options(worker.images, pid=pid, leave_running=True, ghost_limit=_GHOST_LIMIT, notify_scripts=True)
            await worker.call(criu_pb2.Request(type=criu_pb2.DUMP, opts=options), {"post-dump": on_dumped})
        await asyncio.to_thread(_clear_probe, images)


@dataclass
class Worker:
    """One `criu swrk` in a place, for one request. It can wait long before that: it does nothing until asked."""

    channel: socket.socket
    output: Pipes
    inherit: list[criu_pb2.InheritFd]
    folder: Path | None  # of the images
    images: str  # the same as CRIU finds it, by a descriptor: it need not be visible inside
    probed: bytes
    log: Path | None

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, criu: Criu, place: Place, inherit: Mapping[str, int], images: Path | None = None) -> AsyncIterator[Worker]:
        """`inherit`: what takes the place of an outside resource of the image, by its key (`pipe:[inode]`). `images`: their folder."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        output = Pipes("criu")
        keys = list(inherit)
        try:
            with contextlib.ExitStack() as opened, theirs, output.writers() as writers:
                fds = [*writers, theirs.fileno(), *inherit.values()]
                if images:
                    fds.append(os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                    opened.callback(os.close, fds[-1])
                # No file of the place decides what CRIU does: no configuration, no plugin. `/run`: where it looks for its probe.
                pid = await place.spawn([criu.path, "--no-default-config", "swrk", "3"], _ENVIRONMENT, "/run", fds)
            # If CRIU is killed, tasks that it had begun to restore still hold its end: no end of file would come.
            place.exit_of(pid).add_done_callback(lambda _: _no_more(ours))
            inherited = [criu_pb2.InheritFd(key=key, fd=4 + i) for i, key in enumerate(keys)]
            yield cls(ours, output, inherited, images, f"/proc/self/fd/{4 + len(keys)}", criu.probed, criu.log)
        finally:
            ours.close()
            output.close()

    async def restore(self, on_restored: Callable[[], Awaitable[None]]) -> int:
        """Restores from the images' folder. Calls `on_restored` when every mapping stands and every task waits.

        Returns the root process's pid as seen inside.

        Raises:
            CriuError: CRIU failed.
            Exception: what `on_restored` raised; CRIU has then given the restore up.
        """
        _lay_probe(self.probed, self.folder)
        options = _options(self.images, rst_sibling=True, inherit_fd=self.inherit, notify_scripts=True)
        response = await self.call(criu_pb2.Request(type=criu_pb2.RESTORE, opts=options), {"post-restore": on_restored})
        return response.restore.pid

    async def call(
        self, request: criu_pb2.Request, actions: Mapping[str, Callable[[], Awaitable[None]]] | None = None
    ) -> criu_pb2.Response:
        """One request and its answer. `actions`: what to do at CRIU's notifications, by their names; CRIU waits for it meanwhile.

        Raises:
            CriuError: CRIU refused, failed or was killed.
            Exception: what an action raised; CRIU was told, and has given the request up.
        """
        try:
            return await self._converse(request, actions or {})
        except ConnectionError as error:
            raise CriuError(self._why(request, f"it ended in the middle: {error}")) from None

    async def _converse(self, request: criu_pb2.Request, actions: Mapping[str, Callable[[], Awaitable[None]]]) -> criu_pb2.Response:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.channel, request.SerializeToString())
        failure: BaseException | None = None
        while True:
            message = await loop.sock_recv(self.channel, 1 << 16)
            if failure:
                raise failure
            if not message:
                raise CriuError(self._why(request, "it ended without an answer"))
            response = criu_pb2.Response.FromString(message)
            if response.type != criu_pb2.NOTIFY:
                if not response.success:
                    raise CriuError(self._why(request, response.cr_errmsg.strip() or f"errno {response.cr_errno}"))
                return response
            try:
                if action := actions.get(response.notify.script):
                    await action()
            except Exception as error:
                failure = error
            answer = criu_pb2.Request(type=criu_pb2.NOTIFY, notify_success=failure is None)
            await loop.sock_sendall(self.channel, answer.SerializeToString())

    def _why(self, request: criu_pb2.Request, said: str) -> str:
        lines = self.output.lines()
        # A few lines, to a disk that was just written to: it may as well be done here.
        kept = criu_log.keep(self.log, lines, criu_pb2.RequestType.Name(request.type).lower()) if self.log else ""
        return criu_log.explain(lines, said) + kept


def _check_limits_readable(host_pids: Iterable[int]) -> None:
    """The kernel shows a process's limits to its own user, or by a capability that not every root has. Raises CriuError."""
    own = status(os.getpid())
    if int(own["CapEff"], 16) & _CAP_SYS_RESOURCE:
        return
    for pid in host_pids:
        try:
            found = status(pid)
        except OSError:  # it ended
            continue
        user, group = found["Uid"].split(), found["Gid"].split()
        if {*user[:3]} != {own["Uid"].split()[0]} or {*group[:3]} != {own["Gid"].split()[0]}:
            raise CriuError(
                f"process {found['Name']} runs as user {user[0]}, group {group[0]}, and CRIU reads the limits of another user's process "
                "with CAP_SYS_RESOURCE only, which this machine does not give to the agent; give it that, or run the engine as root"
            )


def _options(images: str, **fields: Any) -> criu_pb2.Options:
    """What a dump and its restore must agree on, and `fields`. `images` is a path as CRIU finds it."""
    return criu_pb2.Options(
        images_dir_fd=-1,
        images_dir=images,
        tcp_established=True,
        file_locks=True,
        link_remap=True,
        manage_cgroups_mode=criu_pb2.IGNORE,
        network_lock=criu_pb2.SKIP,
        log_level=_LOG_LEVEL,
        log_to_stderr=True,
        **fields,
    )


def _no_more(channel: socket.socket) -> None:
    """Nothing more will be said: a reader gets what has come, then the end."""
    with contextlib.suppress(OSError):
        channel.shutdown(socket.SHUT_RD)


def _lay_probe(probed: bytes, images: Path | None) -> None:
    """Our build looks for its probe of the kernel in the images' folder: in a container /run is its tenant's."""
    if images and probed and not (path := images / _KDAT).exists():
        fresh = path.with_name(f".{_KDAT}-{secrets.token_hex(4)}")
        fresh.write_bytes(probed)
        fresh.replace(path)


def _clear_probe(images: Path) -> None:
    """What it keeps of its probe says nothing about the node that restores."""
    for leftover in images.glob(f"{_KDAT}*"):
        leftover.unlink()
