"""Two words about one replica: which of them counts, in whatever order they come."""

from __future__ import annotations

import itertools

import pytest

from scaler.books.fairness import Priority
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.fleet.readiness import PodWord, Readiness
from scaler.gateway.dispatcher import Backend, Dispatcher, Endpoint

ID = "pod.0123456789ab"
BACKEND = Backend(ID, "m", Endpoint("127.0.0.1", 1))


class World:
    def __init__(self) -> None:
        self.ledger = Ledger({"m": ModelLimits()})
        self.dispatcher = Dispatcher(self.ledger)
        self.readiness = Readiness(self.dispatcher)

    def say(self, word: str) -> None:
        who, _, what = word.partition(" ")
        if who == "pod" and what != "gone":
            self.readiness.pod_is(BACKEND, PodWord(what))
        elif who == "pod":
            self.readiness.pod_gone(ID)
        elif what in ("ready", "idles"):
            (self.readiness.agent_ready if what == "ready" else self.readiness.agent_finds_asleep)(BACKEND)
        else:
            {
                "retires": self.readiness.agent_retires,
                "fails": self.readiness.agent_finds_failing,
                "ended": self.readiness.agent_ended,
                "silent": self.readiness.agent_silent,
            }[what](ID)

    @property
    def served(self) -> bool:
        return bool(self.dispatcher.ready("m"))

    @property
    def known(self) -> bool:
        return self.ledger.demand("m").replicas > 0


CASES = {
    # What is said in this order: whether new requests are sent to it then, and whether its connections are kept.
    ("pod starting",): (False, False),
    ("pod ready",): (True, True),
    ("agent ready",): (True, True),
    ("agent ready", "pod starting"): (True, True),  # the kubelet has not asked it yet
    ("agent ready", "pod starting", "agent silent"): (True, True),  # the agent died in between
    ("agent ready", "pod ready", "agent silent"): (True, True),
    ("pod ready", "agent ready", "agent silent"): (True, True),
    ("agent ready", "agent silent"): (False, False),
    ("agent ready", "pod unready"): (False, True),
    ("agent ready", "agent fails"): (False, True),
    ("pod ready", "agent ready", "agent fails", "agent ready"): (True, True),
    ("pod ready", "pod unready"): (False, True),
    ("pod ready", "pod unready", "pod ready"): (True, True),
    ("agent ready", "pod ready", "pod unready", "pod ready"): (True, True),
    ("pod unready", "agent ready"): (False, False),
    ("pod ready", "pod leaving"): (False, True),
    ("agent ready", "pod leaving"): (False, True),
    ("agent ready", "pod ready", "agent retires"): (False, True),
    ("agent ready", "pod ready", "agent retires", "agent silent", "pod leaving"): (False, True),
    ("agent ready", "pod ready", "agent ended"): (False, False),
    ("agent ready", "pod ready", "agent ended", "pod ready"): (False, False),  # an older word
    ("pod ready", "pod gone"): (False, False),
    ("agent ready", "pod ready", "pod gone"): (False, True),  # deleted by force: what runs may run on
    ("agent ready", "pod ready", "pod gone", "agent silent"): (False, False),
    ("pod ready", "pod gone", "pod ready"): (True, True),
}


@pytest.mark.parametrize("said", CASES, ids=", ".join)
async def test_what_follows(said: tuple[str, ...]) -> None:
    world = World()
    for word in said:
        world.say(word)
    assert (world.served, world.known) == CASES[said]


WORDS = ("agent ready", "agent silent", "pod ready", "pod unready", "pod leaving", "agent retires", "pod gone")


async def test_never_two_replicas_and_never_one_that_is_said_to_leave() -> None:
    for said in itertools.product(WORDS, repeat=4):
        world = World()
        for word in said:
            world.say(word)
            assert world.ledger.demand("m").replicas <= 1, said
        if said[-1] in ("pod leaving", "pod unready", "agent retires", "pod gone"):
            assert not world.served, said
        if said[-1] == "pod ready" and "agent retires" not in said:
            assert world.served, said


@pytest.mark.parametrize(
    ("said", "sleeps"),
    [
        (("agent ready", "agent idles"), True),
        (("agent idles", "pod ready"), True),
        (("pod ready", "agent idles", "pod unready"), True),  # whatever its probes make of it, it can be woken
        (("agent idles", "agent ready"), False),
        (("agent idles", "pod leaving"), False),
        (("agent idles", "agent retires"), False),
        (("pod ready", "agent idles", "agent silent"), False),  # nobody could wake it: whoever asks there does
    ],
)
async def test_one_that_sleeps_is_woken_for_whoever_waits(said: tuple[str, ...], sleeps: bool) -> None:
    world, wanted = World(), list[str]()
    world.dispatcher.woken_by(lambda backend: wanted.append(backend.id))
    for word in said:
        world.say(word)
    if world.dispatcher.take("m") is None:
        world.dispatcher.hold("m", "tenant", Priority.NORMAL, 0)
    assert bool(wanted) is sleeps


async def test_what_is_gone_is_forgotten() -> None:
    world = World()
    for last in (("pod gone", "agent ended"), ("agent ended", "pod gone"), ("agent silent", "pod gone"), ("pod gone", "agent silent")):
        for word in ("agent ready", "pod ready", *last):
            world.say(word)
        assert not world.readiness._words, last


async def test_an_agents_endpoint_counts() -> None:
    world = World()
    world.say("pod ready")
    world.readiness.agent_ready(Backend(ID, "m", Endpoint("127.0.0.1", 2)))
    world.say("pod ready")
    assert [each.endpoint.port for each in world.dispatcher.ready("m")] == [2]


@pytest.mark.parametrize(
    ("last", "cut"),
    [
        ("agent silent", False),
        ("agent retires", False),
        ("agent fails", False),
        ("pod unready", False),
        ("agent ended", True),
        ("pod gone", True),
    ],
)
async def test_an_answer_is_cut_only_where_its_engine_is_gone(last: str, cut: bool) -> None:
    world = World()
    world.say("pod ready" if last.startswith("pod") else "agent ready")
    member = world.dispatcher.take("m")
    assert member is not None
    world.say(last)
    assert (world.served, member.gone) == (False, cut)
    world.dispatcher.release(member)
    await world.dispatcher.close()
