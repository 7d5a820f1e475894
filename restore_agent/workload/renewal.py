"""What a replica has to make anew, since every other replica of its snapshot has the same in its memory: random state, first of all.

    agent     restore-complete   {"version": 1, "restored": true, "entropy": "…64 hex digits…", "away_seconds": 86400.25}
    process   renews-PID-WHAT    written as it starts: it will see to it; written again at the restore: it has seen to it
    agent     renewal-requested  the same, of a restored engine that sleeps on: whoever hears of it sees to it before its wake

`restore-complete` is one of the control directory's words, which engines only look for; its content is for the engine's user alone to read.
`entropy` is made for this one restore or wake. `restored` says that this process was made of an image; it is false where the process only
slept, as itself. `away_seconds` are those of the wall clock between the dump, or the moment at which it fell asleep, and now.

Whoever reads it may as well ask the kernel: that never repeats itself, nor does what asks the kernel each time (`secrets`, `uuid.uuid4`,
`os.urandom`). Made anew here is what Python's programs keep themselves:

    OpenSSL                  each that is loaded, and that of `cryptography`: `RAND_add` reseeds its root, which its threads' own see
    random, numpy.random     the generators of the modules themselves; those that a program has made for itself are its own
    torch                    its default generators, on all devices; all processes of an engine get the same, as ranks have to agree

A seed that was chosen stays: torch says what it was seeded by, by itself with 53 or 64 random bits, and a number below 2^32 is one that
somebody gave. Then `random`, `numpy.random` and torch are left as they are, since engines seed all three together. The first two do not say
what they were seeded by: where torch is not there, ZEROWAKE_KEEP_SEEDS=1 in the environment says that they shall stay. Rejected: leaving
them alone unless they are known not to be seeded, as most programs never seed them.

This file runs inside engines and imports the standard library alone. `renewal_at_start.py` brings it into any Python program.
What C's library keeps (`rand`, `drand48`) renewal.c sees to, as of any program that it is preloaded into.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "SNAPSHOT_CONTROL_DIR"
KEEP_SEEDS = "ZEROWAKE_KEEP_SEEDS"
SNAPSHOT_COMPLETE, RESTORE_COMPLETE = "snapshot-complete", "restore-complete"
RENEWAL_REQUESTED = "renewal-requested"
ANSWER_DOOR = "answer.fifo"
ANNOUNCED = "renews-"  # PID-WHAT
PYTHON = "python"  # a WHAT
ENTROPY_BYTES = 32
_VERSION = 1
_CHOSEN = 1 << 32  # seeds below it were given by somebody


@dataclass(frozen=True)
class Return:
    """How a process has come to go on: what `restore-complete` says."""

    entropy: bytes  # of this one restore or wake
    away_seconds: float | None  # by the wall clock, since the dump or since it fell asleep; None: nobody knows
    restored: bool  # it was made of an image; else it slept, as itself

    @classmethod
    def fresh(cls, away_seconds: float | None, restored: bool) -> Return:
        return cls(os.urandom(ENTROPY_BYTES), away_seconds, restored)

    def encode(self) -> str:
        away = None if self.away_seconds is None else round(self.away_seconds, 3)
        return json.dumps({"version": _VERSION, "restored": self.restored, "entropy": self.entropy.hex(), "away_seconds": away})

    @classmethod
    def read(cls, folder: Path, word: str = RESTORE_COMPLETE) -> Return:
        """What stands in that word of the control directory. Where an agent wrote none, or this user may not read it: entropy of
        the kernel's, and a restore. Raises FileNotFoundError: the word was not said."""
        try:
            said = json.loads((folder / word).read_text())
            away = said["away_seconds"]
            return cls(bytes.fromhex(said["entropy"]), None if away is None else float(away), bool(said["restored"]))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, LookupError, TypeError):
            return cls.fresh(None, restored=True)


def renew(back: Return) -> dict[str, str]:
    """Makes this process's random state anew, after a restore. Returns what became of what: name → "new", or why it was left."""
    done: dict[str, str] = {}

    def made(name: str, make: Callable[[bytes], object], of: bytes) -> None:
        try:
            make(hashlib.sha512(back.entropy + name.encode() + of).digest())
            done[name] = "new"
        except Exception as error:  # one that refuses shall not keep the others as they were
            done[name] = f"left: {error!r}"

    kernels = os.urandom(ENTROPY_BYTES)
    for name, add in _openssl().items():
        made(name, add, kernels)
    torch = sys.modules.get("torch")
    generators: list[tuple[str, Callable[[bytes], object], bytes]] = []
    if (module := sys.modules.get("random")) and hasattr(module, "seed"):
        generators.append(("random", module.seed, kernels))
    if numpy := sys.modules.get("numpy.random"):
        generators.append(("numpy.random", lambda seed: _seed_numpy(numpy, seed), kernels))
    if torch and hasattr(torch, "manual_seed"):
        # No number below 2^32, by which a seed that was chosen is known.
        generators.append(("torch", lambda seed: torch.manual_seed(int.from_bytes(seed[:7], "little") | 1 << 56), b""))
    why = _kept(torch)
    for name, seed, of in generators:
        if why:
            done[name] = f"left: {why}"
        else:
            made(name, seed, of)
    return done


def is_back(folder: Path) -> bool:
    """Whether the control directory says of this process that it was restored, or has slept; its wake may still be to come."""
    return any(os.access(folder / word, os.F_OK) for word in (RESTORE_COMPLETE, RENEWAL_REQUESTED))


def renew_if_restored(folder: Path) -> dict[str, str]:
    """`renew`, by what the control directory says; nothing where this process only slept. Raises FileNotFoundError, as `Return.read`."""
    back = Return.read(folder, RENEWAL_REQUESTED if os.access(folder / RENEWAL_REQUESTED, os.F_OK) else RESTORE_COMPLETE)
    return renew(back) if back.restored else {}


def listen() -> bool:
    """Has this process, and each that it forks, make its random state anew when it was restored. Returns whether anybody wants a snapshot
    of it. For programs that take no other part in the control directory; a thread waits at its door, and costs nothing.

    What begins after the restore, or is forked once all is new, is left alone: it repeats nothing, and the seed that it chooses counts."""
    named = os.environ.get(VARIABLE)
    if not named or not Path(named, ANSWER_DOOR).exists() or is_back(Path(named)):
        return False
    folder = Path(named)
    is_new = threading.Event()

    def begin() -> None:
        if not is_new.is_set():
            with contextlib.suppress(RuntimeError):  # an interpreter that ends starts no threads
                threading.Thread(target=_listen, args=[folder, is_new], name="renewal", daemon=True).start()

    begin()
    os.register_at_fork(after_in_child=begin)
    return True


def announce(folder: Path, what: str = PYTHON) -> None:
    """Says that this process will see to it, or, once it was restored, that it has."""
    with contextlib.suppress(OSError):  # the engine ends, or may not write there: then it is not waited for
        fresh = folder / f".{ANNOUNCED}{os.getpid()}-{what}"
        fresh.write_text("")
        fresh.rename(folder / fresh.name[1:])


def is_announced(folder: Path) -> bool:
    """Whether this process has said so where it is now."""
    return os.access(folder / f"{ANNOUNCED}{os.getpid()}-{PYTHON}", os.F_OK)


def _listen(folder: Path, is_new: threading.Event) -> None:
    announce(folder)
    while not is_back(folder):
        if (folder / SNAPSHOT_COMPLETE).exists():
            return  # it is the one that was dumped, and goes on as itself
        try:
            os.close(os.open(folder / ANSWER_DOOR, os.O_RDONLY))  # until the word was said
        except OSError:
            return  # the place is being taken down
    try:
        renew_if_restored(folder)
    except Exception:  # the engine goes on, and its log says what is not anew
        traceback.print_exc()
    else:
        is_new.set()
        announce(folder)


def _kept(torch: Any) -> str:
    """Why seeds stay as they are; empty: they do not."""
    if os.environ.get(KEEP_SEEDS):
        return f"{KEEP_SEEDS} is set"
    if torch and hasattr(torch, "initial_seed") and (seed := torch.initial_seed()) < _CHOSEN:
        return f"torch was seeded by {seed}"
    return ""


def _seed_numpy(module: Any, seed: bytes) -> None:
    """The one generator of numpy's older functions."""
    module.seed([int.from_bytes(seed[at : at + 4], "little") for at in range(0, len(seed), 4)])


class _Loaded(ctypes.Structure):
    """The beginning of `struct dl_phdr_info`."""

    _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))


def _loaded(part: str) -> list[str]:
    """Libraries with this in their names, by which the loader finds them again. It compares inodes else, and where the process was restored
    those of its files are others."""
    names: list[str] = []

    def take(each: Any, size: int, data: int | None) -> int:
        if part in (name := os.fsdecode(each.contents.name or b"")):
            names.append(name)
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Loaded), ctypes.c_size_t, ctypes.c_void_p)
    ctypes.CDLL(None).dl_iterate_phdr(callback(take), None)
    return names


def _adds(library: ctypes.CDLL) -> Callable[[bytes], object]:
    add = library.RAND_add
    add.argtypes, add.restype = [ctypes.c_char_p, ctypes.c_int, ctypes.c_double], None
    return lambda seed: add(seed, len(seed), float(len(seed)))


def _openssl() -> dict[str, Callable[[bytes], object]]:
    """`RAND_add` of each OpenSSL that is loaded, by its name."""
    found: dict[str, Callable[[bytes], object]] = {}
    for name in _loaded("libcrypto"):
        with contextlib.suppress(OSError, AttributeError):  # it is another library
            found[name] = _adds(ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY))
    if (own := sys.modules.get("_ssl")) and not found:  # an OpenSSL within Python
        found["ssl"] = lambda seed: own.RAND_add(seed, float(len(seed)))
    bound = sys.modules.get("cryptography.hazmat.bindings._rust")
    library = getattr(getattr(bound, "_openssl", None), "lib", None)
    if library and hasattr(library, "RAND_add"):  # its own OpenSSL
        found["cryptography"] = lambda seed: library.RAND_add(seed, len(seed), float(len(seed)))
    return found
