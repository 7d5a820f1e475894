"""The agent's side of placeholders (placeholder.c): pid 1 of each container that waits on this node for a snapshot, or to give one.

They call: the folder that holds the program and this socket is mounted into their containers (injection.py), and whoever can connect is
in such a container or on the node. Who it is comes from the kernel (SO_PEERCRED), never from what it says. What it says is data of a
tenant: bounded, and believed only about its own container.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import signal
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import zerowake_native

from restore_agent.errors import AgentError
from zerowake_shared.background import kept, told

DEFAULT_FOLDER = Path("/run/zerowake/placeholder")
PROGRAM, SOCKET = "zerowake-placeholder", "agent.sock"
_GREETING_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
_MAX_MESSAGE = 1 << 18
_MAX_GREETING = 64  # callers that have not said who they are; later ones wait in the kernel
_LONGEST_MILLISECONDS = 2**31 - 1
_KEPT_EXITS = 256  # of children that nobody asked about
_T = TypeVar("_T")
_LOG = logging.getLogger("zerowake.agent")


class PlaceholderError(AgentError):
    """A placeholder is gone, or did not do what it was told."""

    reason = "sandbox-failed"


class Placeholder:
    """One of them, for as long as its process lives."""

    def __init__(self, connection: socket.socket | None, pid: int) -> None:
        """Without a connection it has become the container's own command. Raises OSError: the process has ended already."""
        self.pid = pid  # on this host
        self.pidfd = os.pidfd_open(pid)
        self.engine = 0  # pid inside of the engine that it watches over; 0: it waits
        self.command: tuple[str, ...] = ()  # the container's own
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self.loop.create_future()
        self.asked_to_end: asyncio.Future[None] = self.loop.create_future()  # the container, while an engine is in it
        self._connection = connection
        self._greeted: asyncio.Future[None] = self.loop.create_future()
        self._spawned: asyncio.Future[int] | None = None
        self._idle: asyncio.Future[None] | None = None
        self._exits: dict[int, asyncio.Future[int]] = {}
        self.loop.add_reader(self.pidfd, self._process_ended)
        if connection:
            self.loop.add_reader(connection, self._receive)

    async def greeted(self) -> None:
        """Raises PlaceholderError: it did not say in time what a placeholder says."""
        try:
            async with asyncio.timeout(_GREETING_SECONDS):
                await self._greeted
        except TimeoutError:
            raise PlaceholderError(f"pid {self.pid} connected and said nothing") from None

    def exit_of(self, pid: int) -> asyncio.Future[int]:
        """The wait status of a child of it, by its pid inside, once that has ended."""
        future = self._exits.setdefault(pid, self.loop.create_future())
        if self.ended.done() and not future.done():
            future.set_result(signal.SIGKILL)
        return future

    def become(self) -> None:
        """It becomes the container's own command, and is a placeholder no more. Raises PlaceholderError."""
        self._tell("cold")

    async def start(self, command: Sequence[str], env: Mapping[str, str]) -> int:
        """Starts a child as the engine, `env` added to the container's own; its pid inside. Raises PlaceholderError."""
        self._spawned = self.loop.create_future()
        self._tell("start", str(len(env)), *(f"{key}={value}" for key, value in env.items()), *command)
        self.engine = await self._answer(self._spawned, f"start {command[0]}")
        return self.engine

    async def idle(self) -> None:
        """No child's end ends the container from now on, and the ends of those that were are forgotten. Raises PlaceholderError."""
        self._idle = self.loop.create_future()
        self._tell("engine", "0")
        await self._answer(self._idle, "wait")
        self.engine = 0
        self._exits.clear()

    def watch_over(self, pid: int, port: int, hold_seconds: float) -> None:
        """The container ends as this child does, which listens on `port`. A signal that asks it to end is held while clients are connected,
        for so many seconds at most. Raises PlaceholderError."""
        self._tell("engine", str(pid), str(port), str(_milliseconds(hold_seconds)))
        self.engine = pid

    def hold_until(self, seconds: float) -> None:
        """The signal is held for so many seconds from now on at most. Raises PlaceholderError."""
        self._tell("until", str(_milliseconds(seconds)))

    def exit(self, code: int) -> None:
        """The container ends. Raises PlaceholderError."""
        self._tell("exit", str(code))

    def close(self) -> None:
        """Stops listening to it. One that waits calls again."""
        if self.pidfd >= 0:
            self._hang_up("the agent let go of it")
            self.loop.remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1

    async def _answer(self, awaited: asyncio.Future[_T], what: str) -> _T:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await awaited
        except TimeoutError:
            raise PlaceholderError(f"the placeholder was told to {what} and did not answer within {_ANSWER_SECONDS:.0f} s") from None

    def _tell(self, *fields: str) -> None:
        if self._connection is None:
            raise PlaceholderError(f"the placeholder cannot be told to {fields[0]}: it is gone")
        try:
            self._connection.send("".join(f"{field}\0" for field in fields).encode(), socket.MSG_NOSIGNAL)
        except OSError as error:
            what = "the command is too long" if error.errno == errno.EMSGSIZE else str(error)
            raise PlaceholderError(f"the placeholder cannot be told to {fields[0]}: {what}") from error

    def _receive(self) -> bool:
        """Returns whether there may be more."""
        if self._connection is None:
            return False
        try:
            message = self._connection.recv(_MAX_MESSAGE)
        except BlockingIOError:
            return False
        except OSError:
            message = b""
        word, *rest = message.decode(errors="replace").split("\0")
        try:
            self._heard(word, rest[:-1])
        except (ValueError, IndexError):
            self._hang_up(f"it said what no placeholder says: {message[:40]!r}")
        return self._connection is not None

    def _heard(self, word: str, fields: list[str]) -> None:
        if word == "hello":
            if len(fields) < 4:
                raise ValueError
            self.engine, self.command = int(fields[1]), tuple(fields[3:])
            if not self._greeted.done():
                self._greeted.set_result(None)
        elif word == "spawned" and self._spawned and not self._spawned.done():
            self._spawned.set_result(int(fields[0]))
        elif word == "idle" and self._idle and not self._idle.done():
            self._idle.set_result(None)
        elif word == "exited":
            future = self.exit_of(int(fields[0]))
            if not future.done():
                future.set_result(int(fields[1]))
            self._forget_exits()
        elif word == "asked":
            if not self.asked_to_end.done():
                self.asked_to_end.set_result(None)
        elif word == "error" and self._spawned and not self._spawned.done():
            self._spawned.set_exception(PlaceholderError(fields[0]))
        elif not word:
            self._hang_up("it hung up")

    def _forget_exits(self) -> None:
        if len(self._exits) > _KEPT_EXITS:
            for pid in [pid for pid, future in self._exits.items() if future.done()][: _KEPT_EXITS // 2]:
                del self._exits[pid]

    def _hang_up(self, why: str) -> None:
        if self._connection:
            self.loop.remove_reader(self._connection)
            self._connection.close()
            self._connection = None
        for pending in (self._greeted, self._spawned, self._idle):
            if pending and not pending.done():
                pending.set_exception(PlaceholderError(f"pid {self.pid}: {why}"))
                pending.exception()  # nobody may be waiting

    def _process_ended(self) -> None:
        self.loop.remove_reader(self.pidfd)
        while self._receive():
            pass  # its last words
        self._hang_up("it has ended")
        if not self.ended.done():
            self.ended.set_result(None)
        for pid in list(self._exits):
            self.exit_of(pid)


def _milliseconds(seconds: float) -> int:
    return min(max(0, round(seconds * 1000)), _LONGEST_MILLISECONDS)


@contextlib.asynccontextmanager
async def listening(folder: Path, called: Callable[[Placeholder], Awaitable[None]]) -> AsyncIterator[None]:
    """Puts the program and the socket into `folder`; `called` is awaited with each caller that has said hello, and then owns it.

    Raises OSError: the folder cannot be written.
    """
    await asyncio.to_thread(_install, folder)
    path = folder / SOCKET
    path.unlink(missing_ok=True)  # of an agent that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * _MAX_MESSAGE)  # what is accepted inherits it
    listener.bind(str(path))
    ours = path.stat().st_ino
    path.chmod(0o666)  # a container runs as any user; who it is comes from its pid
    listener.listen(_MAX_GREETING)
    reception = _Reception(listener, called)
    accepting = asyncio.create_task(kept(reception.accept, "placeholders", _LOG), name="placeholders")
    try:
        yield
    finally:
        for task in (accepting, *reception.greetings):
            task.cancel()
        await asyncio.gather(accepting, *reception.greetings, return_exceptions=True)
        listener.close()
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == ours:  # and not the next agent's
                path.unlink()


class _Reception:
    """Takes calls, a few at a time: a caller that says nothing must not keep the others waiting."""

    def __init__(self, listener: socket.socket, called: Callable[[Placeholder], Awaitable[None]]) -> None:
        self.greetings: set[asyncio.Task[None]] = set()
        self._listener = listener
        self._called = called
        self._room = asyncio.Semaphore(_MAX_GREETING)

    async def accept(self) -> None:
        """For ever. Raises OSError: no descriptor is left, for one; those that call wait in line."""
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except BaseException:
                self._room.release()
                raise
            connection.setblocking(False)
            task = asyncio.create_task(self._greet(connection), name="a placeholder calls")
            told(task, _LOG)
            self.greetings.add(task)
            task.add_done_callback(self.greetings.discard)

    async def _greet(self, connection: socket.socket) -> None:
        try:
            pid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            placeholder = Placeholder(connection, pid)
        except OSError:
            connection.close()
            self._room.release()
            return
        try:
            await placeholder.greeted()
        except BaseException as error:
            placeholder.close()
            if not isinstance(error, PlaceholderError):
                raise
            return
        finally:
            self._room.release()
        await self._called(placeholder)


def _install(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    fresh = folder / f".{PROGRAM}"
    shutil.copyfile(zerowake_native.PLACEHOLDER, fresh)
    fresh.chmod(0o755)
    fresh.replace(folder / PROGRAM)
