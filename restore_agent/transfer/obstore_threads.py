"""obstore's threads: one for each processor, which its first call of all starts.

Where one of them cannot be started, obstore panics, which no `except Exception` sees, and a lock of its own stays broken: no bucket can be
reached any more for as long as the process lives. An agent can lack threads for a moment (a limit of processes, memory) and go on. So as
many threads are started before, and what lacks is an error like any other, which the next call may find mended.
"""

from __future__ import annotations

import functools
import os

import obstore
from obstore.store import MemoryStore

from restore_agent.transfer.source import Unreachable
from zerowake_shared.lack import startable_threads

_BESIDE = 2  # threads, for whatever else begins one at that moment


@functools.cache
def begin_threads() -> None:
    """To be called before anything of obstore. Once it has returned it does nothing more.

    Raises:
        Unreachable: there is no room for its threads now.
    """
    count = int(os.environ.get("TOKIO_WORKER_THREADS") or os.cpu_count() or 1) + _BESIDE
    if (found := startable_threads(count)) < count:
        raise Unreachable(
            f"buckets are read by {count} threads, and no more than {found} could be started here: raise the limit of processes (systemd: "
            "TasksMax) or of memory, or ask again later"
        )
    obstore.put(MemoryStore(), "begins", b"")


def is_panic(error: BaseException) -> bool:
    """Its class is made anew in each library and derives from BaseException, so that nothing else tells it."""
    return type(error).__name__ == "PanicException"


def broken(error: BaseException) -> Unreachable:
    """The word for it."""
    return Unreachable(f"the library that reads buckets has failed ({error}): ask again, and if it stays so, restart the agent")
