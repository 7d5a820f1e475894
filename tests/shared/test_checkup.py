"""A check that hangs, or fails by a fault of its own, is a line like any other, and ends none of the others."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from zerowake_shared.checkup import Check, Finding, Outcome, Subject, beside, examine, ok, told, warning

SUBJECT = Subject(Path("/nowhere"), Path("/nowhere/gpumem.sock"))


async def lines(*checks: Check) -> list[tuple[str, Outcome, str]]:
    return [(line.check, line.finding.outcome, line.finding.found) for line in await examine(checks, SUBJECT)]


def fine(_: Subject) -> Sequence[Finding]:
    return [ok("one", of="first"), warning("two", "mend it", "second")]


async def fine_too(_: Subject) -> Sequence[Finding]:
    return [ok("three")]


async def test_lines_come_in_the_order_of_the_checks() -> None:
    found = await lines(Check("a", fine), Check("nothing to say", lambda _: []), Check("b", fine_too))
    assert found == [("a", Outcome.OK, "one"), ("a", Outcome.WARNING, "two"), ("b", Outcome.OK, "three")]


async def test_a_check_that_hangs_is_given_up_alone() -> None:
    go = threading.Event()

    def hangs(_: Subject) -> Sequence[Finding]:
        go.wait()
        return []

    try:
        stuck, other = await lines(Check("stuck", hangs, seconds=0.1), Check("other", fine_too))
    finally:
        go.set()
    assert stuck[:2] == ("stuck", Outcome.FAILS)
    assert "no answer within" in stuck[2]
    assert other == ("other", Outcome.OK, "three")


def test_no_exit_waits_for_what_hangs() -> None:
    program = """
import asyncio, threading
from zerowake_shared.checkup import beside
async def main():
    try:
        async with asyncio.timeout(0.1):
            await beside(threading.Event().wait, "hangs for ever")
    except TimeoutError:
        print("given up")
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "given up\n"


async def test_a_fault_of_a_check_is_its_line() -> None:
    def broken(_: Subject) -> Sequence[Finding]:
        raise LookupError("no such thing")

    async def refused(_: Subject) -> Sequence[Finding]:
        raise PermissionError(13, "Permission denied", "/etc/shadow")

    found = await lines(Check("broken", broken), Check("refused", refused), Check("fine", fine_too))
    assert found == [
        ("broken", Outcome.WARNING, "the check itself failed (LookupError: no such thing)"),
        ("refused", Outcome.FAILS, "/etc/shadow: Permission denied"),
        ("fine", Outcome.OK, "three"),
    ]


async def test_what_a_thread_raises_is_raised() -> None:
    def raises() -> None:
        raise ValueError("so it is")

    try:
        await beside(raises, "raises")
    except ValueError as error:
        assert str(error) == "so it is"
    else:
        raise AssertionError("nothing was raised")


def test_an_error_says_what_to_do_after_its_first_semicolon() -> None:
    assert told(ValueError("it is torn; take it again; or not")) == Finding(Outcome.FAILS, "it is torn", "take it again; or not")
