"""obstore's threads: one for each processor, which its first call of all starts.

Where one of them cannot be started, obstore panics, which no `except Exception` sees, and a lock of its own stays broken: no bucket can be
reached any more for as long as the process lives. An agent can lack threads for a moment (a limit of processes, memory) and go on. So as
many threads are started before, and what lacks is an error like any other, which the next call may find mended.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

import obstore
from obstore.store import MemoryStore

from restore_agent.transfer.source import Unreachable
from zerowake_shared.lack import startable_threads

_BESIDE = 2  # threads, for whatever else begins one at that moment


@contextlib.contextmanager
def obstore_threads() -> Iterator[None]:
    """Around whatever calls obstore.

    Raises:
        Unreachable: there is no room for its threads now, or it has panicked.
    """
    try:
        _begin()
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a class that each library makes anew, so that nothing else tells it
            raise
        words = f"the library that reads buckets has failed ({error}): ask again, and if it stays so, restart the agent"
        raise Unreachable(words) from None


@functools.cache
def _begin() -> None:
    """Once it has returned it does nothing more. Raises Unreachable."""
    count = int(os.environ.get("TOKIO_WORKER_THREADS") or os.cpu_count() or 1) + _BESIDE
    if (found := startable_threads(count)) < count:
        raise Unreachable(
            f"buckets are read by {count} threads, and no more than {found} could be started here: raise the limit of processes (systemd: "
            "TasksMax) or of memory, or ask again later"
        )
    obstore.put(MemoryStore(), "begins", b"")
