"""A sandbox: one replica's pid, mount, net and ipc namespaces, held open by a pid 1 of ours (sandbox_init.c), and a file system of its own
over the machine's (layer.py).

The socket to that pid 1 is the lease on everything inside: closing it, by `close`, exit or crash of this process, ends every process
in the sandbox, and with them its mounts and namespaces. Programs are started by message, so that an engine and CRIU alike run inside
without nsenter. Rejected: CRIU making the namespaces itself (it then dumps and restores them too, which is slower and pulls mounts
into the image), and one long-lived `nsenter` helper per call (a process start each).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import zerowake_native

from restore_agent.pages.images import opened
from restore_agent.places.compile_folders import compile_folders
from restore_agent.places.layer import Layer
from restore_agent.places.output import Pipes
from restore_agent.places.place import CONTROL_DIRECTORY, PlaceError, Route, cannot_start
from restore_agent.places.processes import descendant, descendants
from restore_agent.snapshots.compatibility import mapped_files
from restore_agent.snapshots.file_hashes import FileHashes
from restore_agent.snapshots.manifest import CHANGES_FILE, CONTAINER_FILE, Fits
from zerowake_shared.background import to_its_end

_START_SECONDS = 10.0
_END_SECONDS = 5.0
_SO_SNDBUFFORCE = 32  # as SO_SNDBUF, for root beyond the machine's own bound; Python has no name for it
_MAX_MESSAGE = 4 << 20  # as sandbox_init.c has it
_told: set[str] = set()  # of what is so for every sandbox the log hears once
_LOG = logging.getLogger("zerowake.agent")


class Sandbox:
    """The Place of a replica on a machine without Kubernetes. Use `async with await Sandbox.create(…)`, or `close` it."""

    files = Path("/")  # it shows the node's file system, but for what it writes
    addresses = ()
    is_ours = True
    gpus = None

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, layer: Layer) -> None:
        self._process = process
        self._layer = layer
        self._control = control
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._spawning: asyncio.Future[int] | None = None
        self._spawn_lock = asyncio.Lock()
        self._exits: dict[int, asyncio.Future[int]] = {}
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._signs: set[str] = set()
        self.pid = 0  # of pid 1, as the host sees it
        self._is_removed, self._left = False, ""  # the layer, and what was in it then
        self._loop.add_reader(control, self._receive)

    @classmethod
    async def create(cls, kdat: Path, layers: Path | None = None, shared: Sequence[str] = ()) -> Sandbox:
        """Makes the namespaces and the layer.

        Args:
            kdat: CRIU's cached kernel probe, copied in where it exists; it lies in the agent's memory.
            layers: the folder that layers lie in; beside `kdat` if not given.
            shared: folders of the machine's that stay the machine's; those that are missing are made.

        Raises:
            PlaceError: not root, no space for the layer, or the kernel refuses a namespace or the layer.
        """
        layer = await _made(layers or kdat.with_name("layers"), shared, kdat.parent)
        try:
            process, control = _begun(kdat, layer)
        except OSError as error:
            layer.remove()
            raise PlaceError(cannot_start(zerowake_native.SANDBOX_INIT, error)) from error
        sandbox = cls(process, control, layer)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await sandbox._ready
        except BaseException as error:
            await sandbox.close()
            if isinstance(error, TimeoutError):
                raise PlaceError(f"the namespaces were not ready within {_START_SECONDS:.0f} s") from error
            raise
        return sandbox

    async def __aenter__(self) -> Sandbox:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

    @property
    def root(self) -> Path:
        return Path(f"/proc/{self.pid}/root")

    @property
    def netns(self) -> str:
        return f"/proc/{self.pid}/ns/net"

    @property
    def route(self) -> Route:
        return Route("127.0.0.1", self.netns)

    @property
    def control_directory(self) -> Path:
        return self.root / CONTROL_DIRECTORY.relative_to("/")

    async def checkpoint(self, directory: Path, folder: Path) -> Path:
        return directory  # the machine's

    def output(self, name: str) -> Pipes:
        return Pipes(name)

    async def carried(self, dump: Path) -> dict[str, bytes]:
        """What its engine has changed in its file system. Raises PlaceError: it is too much, or of a kind that is not carried."""
        archive = await asyncio.to_thread(lambda: self._layer.archive(self.root, opened(dump)))
        return {CHANGES_FILE: archive} if archive else {}

    def written(self) -> str:
        return self._left if self._is_removed else self._layer.written()

    def compile_caches(self, env: Mapping[str, str]) -> dict[str, Path]:
        return {variable: self.root / path.lstrip("/") for variable, path in compile_folders(env).items()}

    def mapped_files(self, host_pids: Iterable[int]) -> set[Path]:
        """Of those that outlive the sandbox: what is in its layer travels with the snapshot."""
        return {path for path in mapped_files(self.root, host_pids) if not self._layer.has_changed(path)}

    async def lay_out(self, snapshot: Path) -> None:
        """Raises PlaceError: the snapshot needs a container."""
        if (snapshot / CONTAINER_FILE).exists():
            raise PlaceError("it was taken in a container, and can be restored into pods only")
        if (snapshot / CHANGES_FILE).exists():
            await to_its_end(asyncio.to_thread(self._layer.lay_out, snapshot / CHANGES_FILE, self.root))

    async def complete(self, snapshot: Path, fits: Fits, hashes: FileHashes) -> None:
        """That the node has the files that `fits` names was found as the snapshot was staged. Raises PlaceError."""
        await to_its_end(asyncio.to_thread(self._layer.complete))

    async def spawn(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        directory: str,
        fds: Sequence[int],
        *,
        engine: bool = False,
    ) -> int:
        """Starts a program; `fds` become its 1, 2, 3, …. An engine gets the seccomp filter and a pid out of CRIU's way.

        Returns its pid inside.

        Raises:
            PlaceError: the message is too large or has a NUL character, or the sandbox has ended.
        """
        fields = ["spawn", "sp" if engine else "-", directory, str(len(command)), *command, str(len(env))]
        fields += [f"{key}={value}" for key, value in env.items()]
        if odd := [field for field in fields if "\0" in field]:
            raise PlaceError(f"cannot start {command[0]}: there is a NUL character in {odd[0][:80]!r}")
        message = "".join(f"{field}\0" for field in fields).encode()
        async with self._spawn_lock:
            if self._ended.done():
                raise PlaceError(f"cannot start {command[0]}: the sandbox has ended ({self._ended.result()})")
            self._spawning = self._loop.create_future()
            try:
                socket.send_fds(self._control, [message], list(fds))
            except OSError as error:
                what = "command and environment are too large" if error.errno == errno.EMSGSIZE else str(error)
                raise PlaceError(f"cannot start {command[0]}: {what}") from error
            async with asyncio.timeout(_START_SECONDS):
                return await self._spawning

    def exit_of(self, pid: int) -> asyncio.Future[int]:
        """The wait status of a child of init (a spawned program, or what CRIU restored as its sibling), once it has ended."""
        future = self._exits.setdefault(pid, self._loop.create_future())
        if self._ended.done() and not future.done():
            future.set_result(signal.SIGKILL)
        return future

    def host_pids(self) -> dict[int, int]:
        return descendants(self.pid)

    def host_pid(self, pid: int) -> int | None:
        return descendant(self.pid, pid)

    async def close(self) -> None:
        """Ends everything inside. Returns when it has ended; cancelling does not stop the end, only the wait."""
        if self._control.fileno() >= 0:
            self._loop.remove_reader(self._control)
            self._control.close()
            self._end("closed by the agent")
        await asyncio.shield(self._reap())

    async def _reap(self) -> None:
        try:
            await asyncio.to_thread(self._process.wait, _END_SECONDS)
        except subprocess.TimeoutExpired:
            if self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        await asyncio.to_thread(self._remove_layer)

    def _remove_layer(self) -> None:
        if not self._is_removed:
            self._left = self._layer.written()
            self._layer.remove()
            self._is_removed = True

    def _receive(self) -> None:
        try:
            message = self._control.recv(4096).decode(errors="replace")
        except BlockingIOError:
            return
        except OSError:
            message = ""
        if not message:
            self._loop.remove_reader(self._control)
            self._end("its init was killed")
            return
        word, _, rest = message.partition(" ")
        self._hear(word, rest)
        self._signs.add(word)
        if {"ready", "inside"} <= self._signs and not self._ready.done():
            self._ready.set_result(None)

    def _hear(self, word: str, rest: str) -> None:
        if word == "ready":
            self.pid = int(rest)
        elif word == "bare":
            self._layer.leave(rest.partition(":")[0])
            if rest not in _told:
                _told.add(rest)
                _LOG.warning("replicas share what they write below /%s: no layer can be laid over it", rest)
        elif word == "gone":
            self._layer.leave(rest)
        elif word == "spawned" and self._spawning and not self._spawning.done():
            self._spawning.set_result(int(rest))
        elif word == "exited":
            pid, status = map(int, rest.split())
            future = self.exit_of(pid)
            if not future.done():
                future.set_result(status)
        elif word == "error":
            for pending in (self._ready, self._spawning):
                if pending and not pending.done():
                    pending.set_exception(PlaceError(rest))
                    return

    def _end(self, why: str) -> None:
        if self._ended.done():
            return
        self._ended.set_result(why)
        for pending in (self._ready, self._spawning):
            if pending and not pending.done():
                pending.set_exception(PlaceError(f"the sandbox has ended: {why}"))
                pending.exception()  # somebody may have stopped waiting
        for future in self._exits.values():
            if not future.done():
                future.set_result(signal.SIGKILL)


def _begun(kdat: Path, layer: Layer) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The init, by a vfork: half a millisecond, and a thread would cost as much; and our end of its socket. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        ours.setblocking(False)
        with contextlib.suppress(PermissionError):  # the usual bound of a machine is a fifth of a MiB
            ours.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _MAX_MESSAGE // 2)  # which it doubles
        process = subprocess.Popen(
            [zerowake_native.SANDBOX_INIT, str(theirs.fileno()), str(kdat), *layer.arguments],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        return process, ours
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()


async def _made(layers: Path, shared: Sequence[str], memory: Path) -> Layer:
    """A layer that is removed again where nobody waits for it any more. Raises PlaceError."""
    making = asyncio.ensure_future(asyncio.to_thread(Layer.make, layers, shared, memory))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        await asyncio.wait([making])  # it takes a millisecond
        if not making.exception():
            await asyncio.to_thread(making.result().remove)
        raise
