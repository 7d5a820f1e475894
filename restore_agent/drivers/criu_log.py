"""Why CRIU failed, out of what it logged: the error that matters first, in words that a user knows, with the way out where there is one.

CRIU logs from the inside out: first what failed, then each caller that gave up because of it, and "Dumping FAILED" at last. What comes
before the cause are complaints that every run has. So the cause is the first error that is neither. A table knows what the usual ones mean;
for all others CRIU's own words stand. Nothing here decides what is done: it is all text.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path

_LOG_BYTES = 1 << 20  # a log of failures is begun anew when it is longer
_ERROR = re.compile(r"Error \([^)]*\): (.*)")
_HARMLESS = re.compile(r"RLIMIT_NOFILE|kdat|Can't find .* plugin")
_CALLERS = re.compile(
    r"Dumping FAILED|Restoring FAILED|Dump files \(pid|Dump mappings|Collect mappings|Can't dump .* tasks?$|failed with -?\d+\b|"
    r"Unable to .*restore|Can't restore files|\d+ exited, status="
)
_WAYS_OUT: list[tuple[str, str]] = [
    (
        r"Unsupported proto (?P<what>\d+) for socket",
        "the engine has a socket of protocol {what}, and only TCP and UDP are carried; have it use TCP (Go: --env GODEBUG=multipathtcp=0)",
    ),
    (
        r"Unknown socket collected \(family (?P<what>\d+)\)",
        "the engine has a socket of family {what}; have it use TCP, UDP or UNIX sockets",
    ),
    (r"The packetized mode for pipes", "the engine has a pipe in packet mode (O_DIRECT); have it use a plain pipe or a socket pair"),
    (r"Unknown clock type \d+", "the engine has a timer that wakes the machine (timerfd of an ALARM clock); have it use CLOCK_MONOTONIC"),
    (
        r"Can't dump file \d+ of that type \[\w+\] \((?:anon )?(?:anon_inode:)?(?P<what>[^)]*)\)",
        "the engine holds something open that is not carried: {what}; have it closed, or not opened, before the snapshot",
    ),
    (
        r"Unknown shit \d+ \((?P<what>[^)]*)\)",
        "the engine maps something that is not carried: {what}; have it unmapped, or not mapped, before the snapshot",
    ),
    (r"Can't dump nested (?P<what>\w+) namespace", "a process of the engine has a {what} namespace of its own; have it run without"),
    (
        r"doesn't belong to the target user namespace|Unable to convert uid",
        "a process of the engine has a user namespace of its own; have it run without (a browser: --no-sandbox)",
    ),
    (r"Net namespace is required to dump tun", "the engine has a network device (/dev/net/tun) open; have it run without"),
    (
        r"Can't lookup mount=-?\d+ for fd=-?\d+ path=(?P<what>/memfd:\S*)",
        "the engine has memory of huge pages ({what}); have it run without them",
    ),
    (
        r"Can't lookup mount=-?\d+ for fd=-?\d+ path=(?P<what>\S+)",
        "the engine has {what} open, on a mount of its own or as a message queue; have it use the machine's files, pipes or sockets",
    ),
    (
        r"Can't dump ghost file (?P<what>.*) of (?P<size>\d+) size",
        "the engine holds a deleted file of {size} bytes open ({what}); have it keep the file's name, or use less",
    ),
    (
        r"Task with SysVIPC shmem",
        "the engine uses System V shared memory, which no snapshot carries; have it use POSIX shared memory (/dev/shm)",
    ),
    (
        r"External socket is used|half of stream unix connection|name-less external socket|Unix socket \d+ with unreachable peer",
        "the engine is connected, by a UNIX socket, to a process outside of it; have it connect for each request, or after the restore",
    ),
    (
        r"dangling tty|slave peer index|tty to inherit session|ctty inheritance",
        "the engine has a terminal; have it run without one (no script, screen or tmux)",
    ),
    (
        r"File (?P<what>\S+) has bad size (?P<found>\d+) \(expect (?P<size>\d+)\)",
        "{what} has {found} bytes and had {size} when the snapshot was taken; put it back as it was, or take the snapshot again",
    ),
    (
        r"Can't open file (?P<what>\S+) on restore: No such file|Can't open file (?P<other>\S+): No such file",
        "{what}{other} was open when the snapshot was taken and is gone; put it back, or take the snapshot again",
    ),
    (r"Can't bind.*Address already in use", "an address that the engine listens on is taken in its place; end what has it"),
    (
        r"is being traced|Can't (?:seize|ptrace)|ptrace.*Operation not permitted",
        "another program traces the engine; end the debugger or strace",
    ),
    (r"No space left on device", "the disk is full; make room where the snapshots lie"),
    (r"Cannot allocate memory", "the machine has no memory left; end replicas, or drop snapshots from memory"),
]


def explain(lines: Iterable[str], said: str = "") -> str:
    """One line: why it failed. `lines`: CRIU's log. `said`: its answer, for where the log has no error."""
    errors = [found[1].strip() for line in lines if (found := _ERROR.search(line))]
    causes = [error for error in errors if not _HARMLESS.search(error)]
    for error in causes:
        for pattern, words in _WAYS_OUT:
            if found := re.search(pattern, error):
                named = {key: value or "" for key, value in found.groupdict().items()}
                return f"{words.format(**named)} (CRIU: {error})"
    first = next((error for error in causes if not _CALLERS.search(error)), "") or said.strip() or next(iter(causes), "")
    return f"CRIU: {first}" if first else "CRIU gave no reason"


def keep(path: Path, lines: Iterable[str], what: str) -> str:
    """Adds the log of a failure to a file; where it lies, in words, or nothing where it cannot be written. Blocks."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    try:
        with path.open("a") as file:
            if file.tell() > _LOG_BYTES:
                file.truncate(0)
            file.write("".join(f"{stamp} {what}: {line}\n" for line in lines))
    except OSError:
        return ""
    return f"; its log: {path}"
