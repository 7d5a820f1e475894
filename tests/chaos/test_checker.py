"""The checker of the fault run: nothing to say of a run that is as it must be, and of each that is not the one word."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.chaos.checker import GROWTH_BYTES, Line, check, of_quiet

JOURNALS = "requests", "worked", "faults", "stack", "leases", "captures", "seen", "told"
REFUSED = json.dumps({"error": {"code": "replica_failed", "message": "a replica of model 'quick' failed before its answer began"}})


def sent(identity: str, at: float, kind: str = "post") -> Line:
    return {"at": at, "id": identity, "what": "sent", "machine": "one", "model": "quick", "kind": kind}


def done(identity: str, at: float, status: int = 200, *, kind: str = "post", **more: Any) -> Line:
    return {**sent(identity, at, kind), "what": "done", "status": status, "error": "", "right": status == 200, "refusal": ""} | more


def worked(identity: str, begin: float, end: float, replica: str = "net:[1]", model: str = "quick") -> list[Line]:
    line = {"id": identity, "model": model, "replica": replica}
    return [{**line, "at": begin, "what": "begin"}, {**line, "at": end, "what": "end"}]


def fault(began: float, at: float, kind: str = "kill", victim: str = "scaler") -> Line:
    return {"at": at, "began": began, "what": "done", "kind": kind, "victim": victim, "machine": "one", "number": 1}


def quiet(
    at: float,
    size: int = 100 << 20,
    descriptors: int = 20,
    left: tuple[str, ...] = (),
    silent: tuple[str, ...] = (),
    name: str = "one 17",
) -> Line:
    programs = {name: {"bytes": size, "descriptors": descriptors}}
    return {"at": at, "number": 1, "left": list(left), "silent": list(silent), "programs": programs}


def lent(what: str, at: float, borrower: str, *pieces: str, **more: bool) -> Line:
    return {"at": at, "what": what, "borrower": borrower, "pieces": list(pieces), "dirty": False, "kept": True} | more


def told(asked: float, at: float, value: float) -> Line:
    return {"at": at, "what": "told", "machine": "one", "model": "quick", "asked": asked, "value": value}


def whole() -> dict[str, list[Line]]:
    """A run as it must be: answers, a refusal, a connection that a fault broke, a client that left, a service that was hit."""
    return {
        "requests": [
            *(sent("a", 1.0), done("a", 1.5)),
            *(sent("b", 2.0), done("b", 2.5, 502, refusal=REFUSED)),
            *(sent("c", 3.0), done("c", 3.5, 0, error="ServerDisconnectedError")),
            *(sent("d", 4.0, "leaver"), done("d", 4.1, 0, kind="leaver")),
            *(sent("e", 5.0, "get"), done("e", 5.5, kind="get")),
        ],
        "worked": [*worked("a", 1.1, 1.4), *worked("e", 5.1, 5.2), *worked("e", 5.3, 5.4, "net:[2]")],
        "faults": [fault(3.2, 3.2)],
        "stack": [{"at": 3.3, "what": "ended", "service": "one", "code": -9, "hit": True, "stopping": False}],
        "leases": [lent("began", 1.0, "x"), lent("got", 1.1, "x", "7"), lent("gives", 1.2, "x", "7"), lent("got", 1.3, "y", "8")],
        "captures": [{"at": 6.0, "what": "done", "machine": "one", "error": "UNAVAILABLE: gone"}],
        "seen": [quiet(6.0), quiet(9.0, 110 << 20)],
        "told": [told(1.2, 1.3, 1), told(1.0, 1.5, 0), told(6.0, 6.1, 1)],
    }


def said(run: dict[str, list[Line]]) -> list[str]:
    return [each.kind for each in check(*(run[name] for name in JOURNALS))]


def test_a_run_as_it_must_be() -> None:
    assert said(whole()) == []


BAD: dict[str, tuple[str, list[Line]]] = {
    "request without an end": ("requests", [sent("z", 7.0)]),
    "answer without a request": ("requests", [done("z", 7.0)]),
    "request hangs": ("requests", [sent("z", 7.0), done("z", 67.0, 0, error="no answer")]),
    "wrong answer": ("requests", [sent("z", 7.0), done("z", 7.1, right=False)]),
    "answer that no engine gave": ("requests", [sent("z", 7.0), done("z", 7.1)]),
    "connection broke": ("requests", [sent("z", 70.0), done("z", 70.1, 0, error="ServerDisconnectedError")]),
    "unclear refusal": ("requests", [sent("z", 7.0), done("z", 7.1, 503, refusal="error")]),
    "wrong status": ("requests", [sent("z", 7.0), done("z", 7.1, 500, refusal=REFUSED)]),
    "worked for twice": ("worked", worked("a", 1.6, 1.7, "net:[2]")),
    "another model's answer": ("worked", worked("c", 3.1, 3.2, model="cold")),
    "more than its concurrency": ("worked", [line for name in "pqrs" for line in worked(name, 8.0, 8.5)]),
    "lease of two owners": ("leases", [lent("got", 1.4, "x", "8")]),
    "slab lent again": ("leases", [lent("got", 1.4, "x", "7")]),
    "requests that KEDA is not told of": ("told", [told(1.2, 1.3, 0)]),
    "requests that only KEDA is told of": ("told", [told(20.0, 20.1, 4)]),
    "memory that is not clean": ("leases", [lent("got", 1.4, "x", "9", dirty=True)]),
    "memory of two owners": ("leases", [lent("gives", 1.4, "y", "8", kept=False)]),
    "capture hangs": ("captures", [{"at": 7.0, "what": "done", "machine": "one", "error": "no answer"}]),
    "service ended": ("stack", [{"at": 7.0, "what": "ended", "service": "two", "code": 1, "hit": False, "stopping": False}]),
    "service does not end": ("stack", [{"at": 7.0, "what": "did not end", "service": "two"}]),
    "left over": ("seen", [quiet(10.0, left=("mount tmpfs",))]),
    "does not come back": ("seen", [quiet(10.0, silent=("quick of machine one",))]),
    "memory grows": ("seen", [quiet(10.0, (100 << 20) + GROWTH_BYTES + 1)]),
    "descriptors grow": ("seen", [quiet(10.0, descriptors=80)]),
}


@pytest.mark.parametrize("word", BAD)
def test_what_must_not_be(word: str) -> None:
    run = whole()
    journal, lines = BAD[word]
    run[journal] += lines
    assert said(run) == [word]


def test_two_ends_of_one_request() -> None:
    run = whole()
    run["requests"].append(done("a", 1.6))
    assert said(run) == ["request without an end"]


def test_who_was_waiting_as_the_run_was_ended_has_no_end() -> None:
    run = whole()
    run["requests"].append(sent("z", 7.0))
    run["stack"].append({"at": 8.0, "what": "interrupted"})
    assert said(run) == []
    run["stack"][-1]["at"] = 80.0
    assert said(run) == ["request without an end"]


def test_a_fault_elsewhere_explains_nothing() -> None:
    run = whole()
    run["faults"], run["stack"] = [{**fault(3.2, 3.2), "machine": "two"}], []
    assert said(run) == ["connection broke"]


def test_an_engine_that_dies_explains_half_an_answer_and_no_refused_connection() -> None:
    run = whole()
    run["faults"], run["stack"] = [fault(3.2, 3.2, victim="engine")], []
    assert said(run) == ["connection broke"]
    run["requests"][5]["status"] = 200
    assert said(run) == []


@pytest.mark.parametrize("kind", ["wire cut", "wire refuses", "wire half-open", "wire slow", "wire silent"])
@pytest.mark.parametrize("victim", ["engine", "agent", "s3"])
def test_a_connection_to_an_engine_that_is_cut_explains_half_an_answer_and_no_refused_connection(kind: str, victim: str) -> None:
    run = whole()
    run["faults"], run["stack"] = [fault(3.2, 3.2, kind, victim)], []
    assert said(run) == ["connection broke"]
    run["requests"][5]["status"] = 200
    assert said(run) == ([] if victim == "engine" and kind not in ("wire slow", "wire silent") else ["connection broke"])


def test_a_borrower_that_died_has_nothing() -> None:
    run = whole()
    run["leases"] += [lent("began", 2.0, "y"), lent("got", 2.1, "x", "9")]
    assert said(run) == []


def test_an_agent_whose_memory_comes_and_goes_does_not_grow() -> None:
    name, more = "one's agent 7", (100 << 20) + GROWTH_BYTES + 1
    sizes = (60 << 20, 100 << 20, 70 << 20, more, more, 110 << 20, more)
    looks = [quiet(10.0 + number, size, name=name) for number, size in enumerate(sizes)]
    assert [each.kind for each in of_quiet(looks)] == []
    assert [each.kind for each in of_quiet([*looks, quiet(20.0, more, name=name), quiet(21.0, more, name=name)])] == ["memory grows"]
