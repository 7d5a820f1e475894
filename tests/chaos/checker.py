"""The independent checker: reads the journals of a run, and says what was wrong. It shares no code with the product, and asks it nothing.

What it goes by:

    requests    each that was sent has one end: an answer that is right and that an engine worked for, a refusal that names its reason
                (429 or 5xx with an error in OpenAI's shape), or a connection that broke, and then something that was done to the machine at
                that time explains it. None is without an end, and none is answered wrongly.
    engines     a POST is begun once at most, whatever fails (only what is harmless may be tried again), and by its own model. The requests
                that a replica certainly works on at one time, from `begin` to `end`, are never more than its concurrency.
    leases      a piece of lent memory is one owner's from the line that says that it came to the line that says that it goes. These
                intervals lie inside those in which the server counts the lease. A history of an exclusive lock is linearizable exactly if
                the intervals of a key do not overlap, so an overlap proves a violation, and no overlap leaves none that anybody saw. A
                slab comes once only, clean, and keeps what is written.
    ledger      what a KEDA is told of a model lies between how many requests certainly were there throughout its call (an engine works on
                each) and how many can have been (sent, and not answered some seconds before). A count between those could be right at a
                moment of the call; one outside was not, at any.
    quiet       when nobody asks, and nothing is done: no process, mount, namespace, file, chunk or lease beside those that wait for the
                next request, every model answers, and no program has more memory or descriptors than at its first quiet moment.
    captures    each is answered, by whatever.
    services    none ended by itself.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Line = dict[str, Any]

CONCURRENCY = 3
GROWTH_BYTES, GROWTH_DESCRIPTORS = 48 << 20, 24
# At an agent: the most of its first looks is compared with the least of its last, since the images that it holds in memory come and go.
AGENT_LOOKS = 3
_AFTER_SECONDS = 30.0  # that a fault may still explain a broken connection after it was undone: a program starts again meanwhile
_LATE_SECONDS = 5.0  # that an end may be noticed later by the gateway than by whoever asked
_REPLICAS = 2  # of a model, at most
_LONGEST_SECONDS = 65.0  # that a client waits
_CUTTING = {"kill", "stop", "pids", "memory", "memory short", "descriptors", "clock", "disk full"}
_ENGINE_CUT = {"wire cut", "wire refuses", "wire half-open"}  # which end an engine's connections
_REFUSING = {429, 502, 503, 504}


@dataclass(frozen=True)
class Violation:
    """Something that must not be. at: when, as the journals have it."""

    kind: str
    text: str
    at: float = 0.0


def check(
    requests: Sequence[Line],
    worked: Sequence[Line],
    faults: Sequence[Line],
    stack: Sequence[Line],
    leases: Sequence[Line],
    captures: Sequence[Line],
    seen: Sequence[Line],
    told: Sequence[Line],
) -> list[Violation]:
    """All that is wrong, by time."""
    found = [
        *of_requests(requests, worked, faults, stack),
        *of_engines(requests, worked),
        *of_leases(leases),
        *of_ledger(requests, worked, told),
        *of_captures(captures),
        *of_services(stack),
        *of_quiet(seen),
    ]
    return sorted(found, key=lambda each: each.at)


def of_requests(requests: Sequence[Line], worked: Sequence[Line], faults: Sequence[Line], stack: Sequence[Line]) -> Iterable[Violation]:
    sent = {line["id"]: line for line in requests if line["what"] == "sent"}
    done = [line for line in requests if line["what"] == "done"]
    begun = {line["id"] for line in worked if line["what"] == "begin"}
    times = Counter(line["id"] for line in done)
    interrupted = [line["at"] for line in stack if line["what"] == "interrupted"]  # with the clients, and what they had asked
    for identity, line in sent.items():
        if not times[identity] and any(0 <= at - line["at"] < _LONGEST_SECONDS for at in interrupted):
            continue
        if times[identity] != 1:
            yield Violation("request without an end", f"{_said(line)} has {times[identity]} ends", line["at"])
    for line in done:
        yield from _of_answer(line, sent.get(line["id"]), begun, faults, stack)


def _of_answer(line: Line, sent: Line | None, begun: set[str], faults: Sequence[Line], stack: Sequence[Line]) -> Iterable[Violation]:
    if sent is None:
        yield Violation("answer without a request", _said(line), line["at"])
        return
    status, error = line["status"], line["error"]
    if line["kind"] == "leaver" and (error or not status):
        return
    if error == "no answer":
        yield Violation("request hangs", f"{_said(line)} had no answer for {line['at'] - sent['at']:.0f} s", line["at"])
    elif status == 200 and not error:
        if not line["right"]:
            yield Violation("wrong answer", _said(line), line["at"])
        elif line["id"] not in begun:
            yield Violation("answer that no engine gave", _said(line), line["at"])
    elif error:
        if not _explained(line, sent, faults, stack):
            yield Violation("connection broke", f"{_said(line)}: {error}, and nothing was done that explains it", line["at"])
    elif status in _REFUSING:
        if why := _unclear(line["refusal"]):
            yield Violation("unclear refusal", f"{_said(line)}: {status}, {why}: {line['refusal'][:200]!r}", line["at"])
    else:
        yield Violation("wrong status", f"{_said(line)}: {status} {line['refusal'][:200]!r}", line["at"])


def _explained(line: Line, sent: Line, faults: Sequence[Line], stack: Sequence[Line]) -> bool:
    """Whether something that was done to its machine at that time breaks a connection: at the gateway, or below in mid-answer."""
    machine, begin, end = line["machine"], sent["at"], line["at"]
    for fault in faults:
        here = fault["machine"] == machine or fault["kind"] == "pids" or fault["victim"] in ("gpumem", "filler")
        strikes = fault["kind"] in _CUTTING and (line["status"] == 200 or fault["victim"] in ("scaler", ""))
        cuts = fault["kind"] in _ENGINE_CUT and fault["victim"] == "engine" and line["status"] == 200
        if here and (strikes or cuts) and fault["began"] <= end and fault["at"] + _AFTER_SECONDS >= begin:
            return True
    return any(each["what"] == "ended" and each["service"] == machine and begin - _AFTER_SECONDS <= each["at"] <= end + 1 for each in stack)


def _unclear(refusal: str) -> str:
    try:
        error = json.loads(refusal)["error"]
        code, message = error["code"], error["message"]
    except (ValueError, KeyError, TypeError):
        return "no error in OpenAI's shape"
    if not code or not isinstance(message, str) or len(message.split()) < 4:
        return "no reason that says something"
    return ""


def of_engines(requests: Sequence[Line], worked: Sequence[Line]) -> Iterable[Violation]:
    sent = {line["id"]: line for line in requests if line["what"] == "sent"}
    left = {line["id"] for line in requests if line["what"] == "done" and (line["error"] or line["status"] != 200)}
    begins = [line for line in worked if line["what"] == "begin"]
    for identity, count in Counter(line["id"] for line in begins).items():
        if count > 1 and identity in sent and sent[identity]["kind"] in ("post", "leaver"):
            at = max(line["at"] for line in begins if line["id"] == identity)
            yield Violation("worked for twice", f"{_said(sent[identity])} was begun {count} times", at)
    for line in begins:
        if line["id"] in sent and sent[line["id"]]["model"] != line["model"]:
            yield Violation("another model's answer", f"{_said(sent[line['id']])} came to {line['model']}", line["at"])
    yield from _too_many(worked, left)


def _too_many(worked: Sequence[Line], left: set[str]) -> Iterable[Violation]:
    """left: ids whose clients may have gone, which an engine then goes on with for nobody."""
    ends = {(line["replica"], line["id"]): line["at"] for line in worked if line["what"] == "end"}
    begins = Counter((line["replica"], line["id"]) for line in worked if line["what"] == "begin")
    edges: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for line in worked:
        key = line["replica"], line["id"]
        if line["what"] == "begin" and key in ends and line["id"] not in left and begins[key] == 1:  # else no end is one begin's
            edges[line["replica"]] += [(line["at"], 1), (ends[key], -1)]
    for replica, steps in edges.items():
        now = 0
        for at, step in sorted(steps):
            now += step
            if now > CONCURRENCY:
                yield Violation("more than its concurrency", f"replica {replica} worked on {now} requests at once", at)
                break


def of_leases(leases: Sequence[Line]) -> Iterable[Violation]:
    owner: dict[str, str] = {}
    before: set[str] = set()
    for line in leases:
        if line["what"] in ("began", "refused"):  # whatever that one had has ended with its connection
            owner = {piece: name for piece, name in owner.items() if name != line["borrower"]}
        elif line["what"] == "got":
            if line["dirty"]:
                yield Violation("memory that is not clean", f"{line['borrower']} got {line['pieces']}", line["at"])
            for piece in line["pieces"]:
                if piece in owner:
                    yield Violation("lease of two owners", f"piece {piece} is {owner[piece]}'s and {line['borrower']}'s", line["at"])
                elif piece in before:
                    yield Violation("slab lent again", f"piece {piece} came to {line['borrower']}, and had been lent before", line["at"])
                owner[piece] = line["borrower"]
            before.update(line["pieces"])
        elif line["what"] == "gives":
            if not line["kept"]:
                yield Violation(
                    "memory of two owners", f"what {line['borrower']} had written into {line['pieces']} was changed", line["at"]
                )
            for piece in line["pieces"]:
                owner.pop(piece, None)


def of_ledger(requests: Sequence[Line], worked: Sequence[Line], told: Sequence[Line]) -> Iterable[Violation]:
    sent: dict[tuple[str, str], list[float]] = defaultdict(list)
    gone: dict[tuple[str, str], list[float]] = defaultdict(list)
    begun: dict[tuple[str, str], list[float]] = defaultdict(list)
    ended: dict[tuple[str, str], list[float]] = defaultdict(list)
    machines = {line["machine"] for line in told}
    first = {line["id"]: line["at"] for line in reversed(worked) if line["what"] == "begin"}
    last = {line["id"]: line["at"] for line in worked if line["what"] == "end"}
    last |= {line["id"]: line["at"] for line in worked if line["what"] == "last"}  # of a stream, whose end is noted after it
    right = {line["id"]: line for line in requests if line["what"] == "done" and line["right"]}
    for line in requests:
        for machine in machines if not line["machine"] else (line["machine"],):
            (sent if line["what"] == "sent" else gone)[machine, line["model"]].append(line["at"])
    for identity in right.keys() & first.keys() & last.keys():
        of = right[identity]["machine"], right[identity]["model"]
        begun[of].append(first[identity])
        ended[of].append(last[identity])
    for lines in (*sent.values(), *gone.values(), *begun.values(), *ended.values()):
        lines.sort()
    for line in told:
        of = line["machine"], line["model"]
        least = bisect_right(begun[of], line["asked"]) - bisect_left(ended[of], line["at"])
        most = bisect_right(sent[of], line["at"]) - bisect_left(gone[of], line["asked"] - _LATE_SECONDS)
        said = f"KEDA was told {line['value']:g} of {line['model']} of machine {line['machine']}"
        if line["value"] < least:
            yield Violation("requests that KEDA is not told of", f"{said}, where {least} were worked on", line["at"])
        elif line["value"] > max(1, most) + _REPLICAS:  # one for what has just been, and for each replica that nobody reaches
            yield Violation("requests that only KEDA is told of", f"{said}, where {most} had been sent and not answered", line["at"])


def of_captures(captures: Sequence[Line]) -> Iterable[Violation]:
    for line in captures:
        if line["what"] == "done" and line["error"] == "no answer":
            yield Violation("capture hangs", f"on machine {line['machine']}", line["at"])
        elif line["what"] == "done" and line["error"].startswith("UNKNOWN"):
            yield Violation("unclear refusal", f"a capture on machine {line['machine']}: {line['error']}", line["at"])


def of_services(stack: Sequence[Line]) -> Iterable[Violation]:
    for line in stack:
        if line["what"] == "ended" and not line["hit"] and not line["stopping"]:
            yield Violation("service ended", f"{line['service']} ended by itself, with code {line['code']}", line["at"])
        elif line["what"] == "did not end":
            yield Violation("service does not end", f"{line['service']} did not end when it was told to", line["at"])


def of_quiet(seen: Sequence[Line]) -> Iterable[Violation]:
    looks: dict[str, list[Line]] = defaultdict(list)
    for line in seen:
        for what in line["left"]:
            yield Violation("left over", what, line["at"])
        for model in line["silent"]:
            yield Violation("does not come back", model, line["at"])
        for name, size in line["programs"].items():
            looks[name].append(size)
            began, count = looks[name][0], AGENT_LOOKS if "agent" in name else 1
            first = max(look["bytes"] for look in looks[name][:count])
            held = min(look["bytes"] for look in looks[name][-count:])
            if held > first + GROWTH_BYTES:
                yield Violation("memory grows", f"{name}: {first >> 20} MiB, and now {held >> 20}", line["at"])
            if size["descriptors"] > began["descriptors"] + GROWTH_DESCRIPTORS:
                yield Violation("descriptors grow", f"{name}: {began['descriptors']}, and now {size['descriptors']}", line["at"])


def _said(line: Line) -> str:
    return f"{line['kind']} {line['id']} for {line['model']} of machine {line['machine'] or '?'}"
