"""A thread that reaches files with the rights of a container's user, and none of the agent's.

What is written into a container as its user could have written it there gives that user nothing: it is theirs from the first moment on,
and where they may not write the agent does not either. Linux keeps this identity for each thread (setfsuid); the capabilities over files go
with it, and come back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass

_libc = ctypes.CDLL(None, use_errno=True)
_ASK = -1  # no identity: the call says which one there is


@dataclass(frozen=True, slots=True)
class User:
    """By numbers. name: as the machine or container that they are of knows it; empty: it has none."""

    uid: int
    gid: int
    name: str = ""


@contextlib.contextmanager
def acting_as(user: User) -> Iterator[None]:
    """This thread, until the block ends; blocks may lie in each other. Within, nothing may be awaited and no thread begun, which would be
    that user's for ever. Raises PermissionError."""
    before = User(_libc.setfsuid(_ASK), _libc.setfsgid(_ASK))
    try:
        _become(user)
        yield
    finally:
        _become(before)


def _become(user: User) -> None:
    """First the group, which only the agent's own user may change; back in the other order."""
    if _libc.setfsuid(_ASK) != os.geteuid():
        _libc.setfsuid(os.geteuid())
    _libc.setfsgid(user.gid)
    _libc.setfsuid(user.uid)
    if (_libc.setfsuid(_ASK), _libc.setfsgid(_ASK)) != (user.uid, user.gid):
        raise PermissionError(f"this process may not reach files as user {user.uid}, group {user.gid}")
