"""A process that has next to nothing left of what the kernel gives it."""

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """So many more may be opened at a time, and no others."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
    filled = [os.open("/dev/null", os.O_RDONLY)]
    while filled[-1] < highest:
        filled.append(os.dup(filled[0]))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(highest, filled[-1]) + 1 + count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for each in filled:
            os.close(each)


@contextmanager
def no_threads() -> Iterator[None]:
    """Python can start none: no address space has room for its stack."""
    before = threading.stack_size(1 << 62)
    try:
        yield
    finally:
        threading.stack_size(before)
