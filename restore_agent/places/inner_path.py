"""Paths in a tenant's file system that the agent follows, symbolic links and all, and never leaves it by them.

The kernel follows no link on the views that the agent has of containers (join.c), so they are followed here, one name at a time. A step
opens one name below the directory that the step before has opened, and follows nothing by itself. A link is text, whose names are further
steps: `..` goes back to a directory that is open already and ends at the root, and an absolute link begins there again. What is found is
held open, and read by that: whatever its tenant puts in the place of any of the names meanwhile, nothing is looked for a second time.

What was found says which mount it lies on, so that a link can be kept from leading into another volume. Rejected: the kernel's own
RESOLVE_IN_ROOT, which needs a view on which links are followed, by every other use of a path there, too; RESOLVE_BENEATH, which refuses
links that go up and down again, as all of a Hugging Face cache do; a path that is made real first and opened later, which is another one
by then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_MOST_LINKS = 40  # as the kernel has it
_HELD = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class InnerPath:
    """A file or directory that was found, held open without any right to read it. Use `with InnerPath.found(…)`."""

    def __init__(self, names: tuple[str, ...], directory: int, held: int) -> None:
        self.path = PurePosixPath("/", *names)  # no part of it is a link
        self._directory = directory
        self._held = held

    @classmethod
    @contextlib.contextmanager
    def found(cls, root: Path, path: PurePosixPath) -> Iterator[InnerPath]:
        """`root`: of the tenant's file system. `path`: as the tenant's processes see it. Raises OSError."""
        names, trail = _walked(root, path)
        try:
            for above in trail[:-2]:
                os.close(above)
            trail = trail[-2:]
            yield cls(names, trail[0], trail[-1])
        finally:
            for fd in trail:
                os.close(fd)

    @property
    def status(self) -> os.stat_result:
        return os.fstat(self._held)

    @property
    def mount(self) -> int:
        """The number of the mount that it lies on; every volume has one of its own."""
        lines = Path(f"/proc/self/fdinfo/{self._held}").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))

    def names(self) -> list[str]:
        """In a directory. Raises OSError."""
        return [entry.name for entry in Path(f"/proc/self/fd/{self._held}").iterdir()]

    def remove(self, name: str) -> None:
        """Of a directory; a link itself, not what it leads to. Raises OSError."""
        os.unlink(name, dir_fd=self._held)

    def remove_itself(self) -> None:
        """A file. Raises OSError."""
        os.unlink(self.path.name, dir_fd=self._directory)

    @contextlib.contextmanager
    def reading(self) -> Iterator[int]:
        """A descriptor of a plain file. Raises OSError, also of what is none: a pipe or a device would keep its reader waiting."""
        if not stat.S_ISREG(self.status.st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        fd = os.open(f"/proc/self/fd/{self._held}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


def _walked(root: Path, path: PurePosixPath) -> tuple[tuple[str, ...], list[int]]:
    """The names that lead there without a link, and what each of them is, the root first. Raises OSError."""
    trail = [os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]  # itself a link of /proc's
    names: list[str] = []
    waiting = [*reversed(path.parts)]
    links = 0
    try:
        while waiting:
            name = waiting.pop()
            if name.startswith("/"):
                _back(trail, names, to=1)
            elif name == "..":
                _back(trail, names, to=max(1, len(trail) - 1))
            elif name:
                fd = os.open(name, _HELD, dir_fd=trail[-1])
                trail.append(fd)
                names.append(name)
                if stat.S_ISLNK(os.fstat(fd).st_mode):
                    links += 1
                    if links > _MOST_LINKS:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                    waiting += reversed(PurePosixPath(os.readlink("", dir_fd=fd)).parts)
                    _back(trail, names, to=len(trail) - 1)
    except BaseException:
        _back(trail, names, to=0)
        raise
    return tuple(names), trail


def _back(trail: list[int], names: list[str], to: int) -> None:
    while len(trail) > to:
        os.close(trail.pop())
    del names[max(0, to - 1) :]
