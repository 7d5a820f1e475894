"""The agent's side of what replicas make anew (workload/renewal.py): which processes of an engine see to it, and which do not.

A process says so in the control directory, `renews-PID-WHAT`, before the dump; which did stands in the snapshot. Restored, it says so
again, and until then its replica serves nobody: no request may be answered from the state that all replicas have. Who wants a signal to
hear of it wrote its name there: SIGURG, which does nothing to a process that does not ask for it, and no other.

A process that maps what keeps such state, and does not say that it sees to it, is named by `create`. What it keeps otherwise nobody sees;
nor whether it calls C's `rand`, which nearly every process can, since so many libraries name it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Collection, Mapping
from importlib.resources import files
from pathlib import Path

import zerowake_native

from restore_agent.places.place import Place, PlaceError
from restore_agent.places.processes import command_line
from restore_agent.workload.renewal import ANNOUNCED, PYTHON

WANTED = "ZEROWAKE_RENEW"  # in an engine's environment: it is started with what sees to it
RENEWAL_FILE = "renewal.json"  # of a snapshot: [PID, WHAT, signal or ""] of each
SIGNAL = "SIGURG"
NODE, OPENSSL = "node", "openssl"
_FOLDER = "zerowake-renewal"  # in a sandbox's /run, with which it travels: a snapshot needs no file of the agent's version
_INSIDE = Path("/run", _FOLDER)
_NAME = re.compile(rf"{ANNOUNCED}(\d+)-([a-z]+)")
_STATE = {PYTHON: "Python's random", NODE: "Node's Math.random and crypto", OPENSSL: "OpenSSL"}
_CALLED_LENGTH = 40  # characters of a command in a note
_NAMED = 4  # processes that are named where there are more
Announced = tuple[int, str, str]  # pid inside, WHAT, the signal that it wants or nothing


def lay_out(place: Place, env: Mapping[str, str]) -> dict[str, str]:
    """What sees to it, put into a sandbox, and the environment that brings it into every program. Blocks. Raises PlaceError."""
    folder = place.control_directory.parents[1] / _FOLDER
    workload = files("restore_agent.workload")
    try:
        (folder / "python").mkdir(parents=True)
        shutil.copyfile(zerowake_native.RENEWAL, folder / "renewal.so")
        for source, target in (
            ("renewal.cjs", "renewal.cjs"),
            ("renewal.py", "python/zerowake_renewal.py"),
            ("renewal_at_start.py", "python/sitecustomize.py"),
        ):
            (folder / target).write_bytes((workload / source).read_bytes())
    except OSError as error:
        raise PlaceError(f"what has an engine renew its random state cannot be laid out: {error}") from error

    def first(value: str, variable: str, parted_by: str) -> str:
        return f"{value}{parted_by}{env[variable]}" if env.get(variable) else value

    return {
        **env,
        "LD_PRELOAD": first(f"{_INSIDE}/renewal.so", "LD_PRELOAD", ":"),
        "PYTHONPATH": first(f"{_INSIDE}/python", "PYTHONPATH", ":"),
        "NODE_OPTIONS": first(f"--require {_INSIDE}/renewal.cjs", "NODE_OPTIONS", " "),
    }


def announced(control_directory: Path, pids: Collection[int]) -> tuple[Announced, ...]:
    """By the processes of these pids, as the place has them. Raises OSError."""
    found = []
    for path in sorted(control_directory.iterdir()):
        if (match := _NAME.fullmatch(path.name)) and int(match[1]) in pids:
            wants = path.read_text(errors="replace") == SIGNAL if path.is_file() and not path.is_symlink() else False
            found.append((int(match[1]), match[2], SIGNAL if wants else ""))
    return tuple(found)


def encode(them: Collection[Announced]) -> bytes:
    return json.dumps(sorted(them)).encode()


def read(snapshot: Path) -> tuple[Announced, ...]:
    """Of a snapshot's folder. Raises OSError, ValueError."""
    path = snapshot / RENEWAL_FILE
    if not path.exists():
        return ()
    return tuple((int(pid), str(what), SIGNAL if wants == SIGNAL else "") for pid, what, wants in json.loads(path.read_bytes()))


def send(them: Collection[Announced], host_pid: Callable[[int], int | None]) -> None:
    """The signal, to those that want it. `host_pid`: of a pid inside; None: it has ended."""
    for pid, _, wants in them:
        if wants and (host := host_pid(pid)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(host, signal.SIGURG)


def awaited(them: Collection[Announced], control_directory: Path) -> list[Announced]:
    """Those that have not said it again."""
    return [each for each in them if not os.access(control_directory / f"{ANNOUNCED}{each[0]}-{each[1]}", os.F_OK)]


def note(hosts: Mapping[int, int], them: Collection[Announced], is_sandbox: bool) -> str:
    """What of the engine is the same in each replica, in a sentence; empty: nothing that is known. Blocks."""
    said = {(pid, what) for pid, what, _ in them}
    lacking: dict[str, list[str]] = {}
    for pid, host in hosts.items():
        with contextlib.suppress(OSError):  # it has ended
            command = command_line(host)
            for what in _keeps(host, command):
                # Python's part makes OpenSSL anew, too.
                if (pid, what) not in said and not (what == OPENSSL and (pid, PYTHON) in said):
                    lacking.setdefault(_STATE[what], []).append(f"pid {pid} ({command[:_CALLED_LENGTH]})")
    if not lacking:
        return ""
    listed = "; ".join(
        f"{state} of {', '.join(where[:_NAMED])}{f' and {len(where) - _NAMED} more' if len(where) > _NAMED else ''}"
        for state, where in lacking.items()
    )
    way = "Take it with --renew, or have" if is_sandbox else "Have"
    return (
        f"each replica starts with the same random state: {listed}. Tokens, keys and ids that are made of it repeat in other replicas. "
        f"{way} it draw anew at `restore-complete` (restore_agent/README.md, What each replica has anew)"
    )


def _keeps(host: int, command: str) -> list[str]:
    """What of this kind a process has. Raises OSError: it has ended."""
    names = {line.rsplit("/", 1)[1] for line in Path(f"/proc/{host}/maps").read_text().splitlines() if "/" in line}
    program = Path(f"/proc/{host}/exe").readlink().name
    found = []
    is_python = re.fullmatch(r"(python|pypy)[0-9.]*", program) or any(name.startswith("libpython") for name in names)
    if is_python and "multiprocessing.resource_tracker" not in command:  # that draws nothing
        found.append(PYTHON)
    if program in ("node", "nodejs") or any(name.startswith("libnode.") for name in names):
        found.append(NODE)
    if found == [NODE] or any(name.startswith("libcrypto") for name in names):
        found.append(OPENSSL)
    return found
