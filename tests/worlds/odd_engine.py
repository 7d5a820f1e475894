"""A threaded HTTP server that has one thing which snapshots trip over. `python -m tests.worlds.odd_engine PORT TRAIT…`

`/health` answers when the trait is there; `/look` answers what has become of it: the same before the snapshot and in each replica, where
it was carried.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus

from tests.worlds.json_answers import json_server

LIBC = ctypes.CDLL(None, use_errno=True)
PRIVATE, CREATE = 0, 0o1600
MQ_OPEN, TIMERFD_CREATE, TIMERFD_SETTIME = 240, 283, 286  # of x86_64
MONOTONIC, ABSOLUTE, NONBLOCKING = 1, 1, os.O_NONBLOCK
Look = Callable[[], object]


def done(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def nothing() -> Look:
    return lambda: "nothing"


def daemon() -> Look:
    """A helper that forks twice, as servers that go into the background do."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)", "the", "helper"])
        os._exit(0)
    os.wait()
    return lambda: "a helper"


def background() -> Look:
    """A command that a shell has put into the background."""
    subprocess.run(["/bin/sh", "-c", "sleep 1000 >/dev/null 2>&1 &"], check=True)
    return lambda: "a helper"


def child() -> Look:
    """A helper as it should be."""
    helper = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return lambda: helper.poll() is None


def ended_child() -> Look:
    """One whose end nobody has asked for yet, as it is with compilers that an engine has started."""
    helper = subprocess.Popen(["true"])

    def look() -> bool:
        return os.waitid(os.P_PID, helper.pid, os.WEXITED | os.WNOWAIT) is not None

    look()
    return look


def semaphores() -> Look:
    made = done(LIBC.semget(PRIVATE, 1, CREATE))
    return lambda: done(LIBC.semctl(made, 0, 12)) >= 0


def message_queue() -> Look:
    made = done(LIBC.msgget(0x1234, CREATE))
    return lambda: made >= 0


def shared_memory() -> Look:
    """Which nobody is attached to: CRIU itself sees it only where somebody is."""
    made = done(LIBC.shmget(PRIVATE, 4096, CREATE))
    return lambda: made >= 0


def posix_queue() -> Look:
    """With messages in it, and closed."""
    made = done(LIBC.syscall(MQ_OPEN, b"jobs", os.O_CREAT | os.O_RDWR, 0o600, None))
    os.close(made)
    return lambda: "closed"


def timer(flags: int, first: float, every: float) -> int:
    """A descriptor."""
    made = done(LIBC.syscall(TIMERFD_CREATE, MONOTONIC, NONBLOCKING))
    start = first + (time.monotonic() if flags & ABSOLUTE else 0)
    wanted = struct.pack("<qqqq", int(every), int(every % 1 * 1e9), int(start), int(start % 1 * 1e9))
    done(LIBC.syscall(TIMERFD_SETTIME, made, flags, wanted, None))
    return made


def ticks(made: int, within: float) -> int:
    """How often it has expired since it was read last; 0: not within that time."""
    with selectors.DefaultSelector() as selector:
        selector.register(made, selectors.EVENT_READ)
        return struct.unpack("<Q", os.read(made, 8))[0] if selector.select(within) else 0


def periodic_timer(flags: int = 0) -> Look:
    """It has expired before the snapshot, and only `/look` reads it: twice, and each time it has expired."""
    made = timer(flags, 0.05, 0.05)
    return lambda: [ticks(made, 3) > 0 for _ in range(3)]


def timer_at_a_moment() -> Look:
    """It expired before, was read, and was set to another moment then, far away."""
    made = timer(ABSOLUTE, 0.01, 0)
    assert ticks(made, 3) == 1
    done(LIBC.syscall(TIMERFD_SETTIME, made, ABSOLUTE, struct.pack("<qqqq", 0, 0, int(time.monotonic()) + 1000, 0), None))
    return lambda: ticks(made, 0.5)


def stopped_timer() -> Look:
    """It was set to a moment, and then to none."""
    made = timer(ABSOLUTE, 1000, 0)
    done(LIBC.syscall(TIMERFD_SETTIME, made, ABSOLUTE, bytes(32), None))
    return lambda: ticks(made, 0.5)


def signal_timer() -> Look:
    """A period by setitimer, whose signal is blocked while nobody looks."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    return lambda: [signal.sigtimedwait([signal.SIGALRM], 3) is not None for _ in range(3)]


def packets() -> Look:
    """A pipe in packet mode, which CRIU refuses."""
    read, write = os.pipe2(os.O_DIRECT)
    os.write(write, b"x")
    return lambda: [read, write] != []


def multipath() -> Look:
    """Listens by MPTCP where the kernel has it, else by TCP, as Go does."""
    try:
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    except OSError:
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.bind(("127.0.0.1", 0))
    listening.listen()

    def look() -> object:
        with socket.create_connection(listening.getsockname()) as client, listening.accept()[0] as server:
            client.sendall(b"here")
            return server.recv(4).decode()

    return look


def watchdog() -> Look:
    """Looks at the monotonic clock all the time; whether it has ever jumped, as a supervisor sees it whose workers seem to hang."""
    gaps = [0.0]

    def watch() -> None:
        last = time.monotonic()
        while True:
            time.sleep(0.05)
            now = time.monotonic()
            gaps.append(now - last)
            del gaps[gaps.index(min(gaps))]
            last = now

    threading.Thread(target=watch, daemon=True).start()
    return lambda: max(gaps) < 3.5


TRAITS: dict[str, Callable[[], Look]] = {
    "nothing": nothing,
    "daemon": daemon,
    "background": background,
    "child": child,
    "ended-child": ended_child,
    "semaphores": semaphores,
    "message-queue": message_queue,
    "shared-memory": shared_memory,
    "posix-queue": posix_queue,
    "periodic-timer": periodic_timer,
    "absolute-periodic-timer": lambda: periodic_timer(ABSOLUTE),
    "timer-at-a-moment": timer_at_a_moment,
    "stopped-timer": stopped_timer,
    "signal-timer": signal_timer,
    "packets": packets,
    "multipath": multipath,
    "watchdog": watchdog,
}


def main() -> None:
    port, names = int(sys.argv[1]), sys.argv[2:]
    looks = {name: TRAITS[name]() for name in names}
    looking = threading.Lock()

    def answer(path: str) -> tuple[HTTPStatus, object]:
        if path == "/look":
            with looking:
                return HTTPStatus.OK, {name: look() for name, look in looks.items()}
        return HTTPStatus.OK, {}

    json_server(port, answer).serve_forever()


if __name__ == "__main__":
    main()
