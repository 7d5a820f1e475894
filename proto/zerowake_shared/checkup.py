"""Checks of what a machine or a cluster can do: what one is, what it finds, and how all of them are made.

Each room brings its own checks under the entry point group `zerowake.checks`, as it brings its commands. A check that hangs is given up
when its time is over, and one that fails by a fault of its own says so in its line: neither ever ends the others. What blocks (a disk that
does not answer, above all) runs in a thread that no exit of the program waits for; Python's own pools wait for theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import inspect
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from zerowake_shared.one_line import described

GROUP = "zerowake.checks"
_SECONDS = 10.0
_T = TypeVar("_T")


class Outcome(enum.Enum):
    """What a check came to."""

    OK = "ok"
    WARNING = "warning"  # it works, and less well than it could; or it could not be looked at
    FAILS = "fails"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was found, and what to do where that is not well. `of`: of which of several things it is."""

    outcome: Outcome
    found: str
    remedy: str = ""
    of: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at. store: the URL of a store of snapshots; empty: none. namespace: that zerowake is installed in, on Kubernetes."""

    state: Path
    gpumem: Path
    keys: Path | None = None
    file: Path | None = None  # a zerowake.yaml
    store: str = ""
    namespace: str = "zerowake"


@dataclass(frozen=True, slots=True)
class Check:
    """`look` may block, or be a coroutine function. seconds: how long it may take."""

    name: str
    look: Callable[[Subject], Sequence[Finding] | Awaitable[Sequence[Finding]]]
    seconds: float = _SECONDS
    of_cluster: bool | None = False  # and not of the machine that it runs on; None: of both


@dataclass(frozen=True, slots=True)
class Line:
    """What a check found, under its name."""

    check: str
    finding: Finding

    def as_json(self) -> dict[str, str]:
        found = self.finding
        return {"check": self.check, "of": found.of, "outcome": found.outcome.value, "found": found.found, "remedy": found.remedy}


def ok(found: str, of: str = "") -> Finding:
    return Finding(Outcome.OK, found, of=of)


def warning(found: str, remedy: str = "", of: str = "") -> Finding:
    return Finding(Outcome.WARNING, found, remedy, of)


def fails(found: str, remedy: str = "", of: str = "") -> Finding:
    return Finding(Outcome.FAILS, found, remedy, of)


def told(error: Exception, outcome: Outcome = Outcome.FAILS, of: str = "") -> Finding:
    """An error of ours as a finding: its text says what happened, and after the first semicolon what to do."""
    found, _, remedy = described(error).partition("; ")
    return Finding(outcome, found, remedy, of)


async def examine(checks: Iterable[Check], subject: Subject) -> list[Line]:
    """Makes all checks at once; their lines come in the order of the checks."""
    each = list(checks)
    found = await asyncio.gather(*(_looked(check, subject) for check in each))
    return [Line(check.name, finding) for check, findings in zip(each, found, strict=True) for finding in findings]


async def _looked(check: Check, subject: Subject) -> Sequence[Finding]:
    try:
        async with asyncio.timeout(check.seconds):
            if inspect.iscoroutinefunction(check.look):
                found: Sequence[Finding] = await check.look(subject)
                return found
            return await beside(lambda: check.look(subject), f"check of {check.name}")  # type: ignore[arg-type, return-value]
    except TimeoutError:
        return [fails(f"no answer within {check.seconds:.0f} s: what it looks at hangs, or this machine is busy", "run it again")]
    except OSError as error:
        return [told(error)]
    except Exception as error:  # whatever it is: the other checks are worth their lines
        fault = f"the check itself failed ({type(error).__name__}: {described(error)})"
        return [warning(fault, "report it with what `zerowake bundle` makes")]


async def beside(work: Callable[[], _T], name: str) -> _T:
    """What `work` returns or raises, from a thread that nobody waits for where this is cancelled."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def settle(settled: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(lambda: None if done.done() else settled())

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            failure = error
            settle(lambda: done.set_exception(failure))
        else:
            settle(lambda: done.set_result(result))

    threading.Thread(target=run, name=name, daemon=True).start()
    return await done
