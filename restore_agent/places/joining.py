"""What is done inside a running container by a program of the agent's (join.c), which enters it: programs started, mounts copied."""

from __future__ import annotations

import asyncio
import functools
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import zerowake_native

from restore_agent.places.place import PlaceError, cannot_start

_SECONDS = 10.0
_PT_INTERP = 3


class JoinFailed(PlaceError):
    """A container could not be entered, or a program may not be run in it."""


async def join(init: int, what: str, words: Sequence[str], fds: Sequence[int], env: Mapping[str, str]) -> tuple[str, list[int]]:
    """Runs join; returns what it reported, and the descriptors that it sent. `init`: pidfd of the container's pid 1. Raises JoinFailed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours:
        try:
            process = subprocess.Popen(  # noqa: ASYNC220  a vfork: half a millisecond, a thread would cost as much
                [zerowake_native.JOIN, what, str(theirs.fileno()), str(init), *words],
                pass_fds=[theirs.fileno(), init, *fds],
                env=dict(env),
                stdin=subprocess.DEVNULL,
            )
        except OSError as error:
            raise JoinFailed(cannot_start(zerowake_native.JOIN, error)) from error
        finally:
            theirs.close()
        said, received = "", list[int]()
        try:
            async with asyncio.timeout(_SECONDS):
                while True:
                    await _readable(ours)
                    data, sent, _, _ = socket.recv_fds(ours, 4096, 1, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
                    received += sent
                    if not data:
                        return said, received
                    said += data.decode(errors="replace")
        except TimeoutError:
            raise JoinFailed(f"the container could not be entered within {_SECONDS:.0f} s") from None
        finally:
            process.kill()  # it has ended, unless the time was over
            process.wait()


async def _readable(channel: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(channel, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(channel)


def listed(fds: Sequence[int]) -> str:
    """Descriptors, as join takes them."""
    return ",".join(map(str, fds)) or "-"


@functools.lru_cache(maxsize=16)
def _is_static(program: str, _changed: int) -> bool:
    with Path(program).open("rb") as file:
        head = file.read(64)
        if head[:5] != b"\x7fELF\x02":
            return False
        offset, size, count = (*struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54))[:3]
        file.seek(offset)
        table = file.read(size * count)
    return all(struct.unpack_from("<I", table, at)[0] != _PT_INTERP for at in range(0, len(table), size))


def check_static(program: str) -> None:
    """Raises JoinFailed unless the program brings all that it runs."""
    if not _is_static(program, Path(program).stat().st_mtime_ns):
        raise JoinFailed(
            f"{program} is linked dynamically and would run the container's libraries with the agent's rights; use a static one"
        )
