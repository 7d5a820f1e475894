"""When a peer is told of what: at once, or with what follows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from zerowake_proto import peers_pb2 as pb

from scaler.fleet.post import Post
from scaler.fleet.subscriber import GATHER_SECONDS, Subscriber
from tests.worlds.virtual_time import run


def told(*steps: tuple[float, Callable[[Subscriber], object]]) -> list[tuple[float, list[str], list[str]]]:
    """What a subscriber hears, and when, of what is done at these moments."""

    async def story() -> list[tuple[float, list[str], list[str]]]:
        loop = asyncio.get_running_loop()
        subscriber = Subscriber(loop.time)
        heard: list[tuple[float, list[str], list[str]]] = []

        async def listen() -> None:
            while True:
                changed, pushed, _ = await subscriber.due()
                heard.append((loop.time(), list(changed), list(pushed)))

        listening = asyncio.create_task(listen())
        for moment, step in steps:
            await asyncio.sleep(moment - loop.time())
            step(subscriber)
        await asyncio.sleep(1)
        listening.cancel()
        return heard

    work: Coroutine[Any, Any, list[tuple[float, list[str], list[str]]]] = story()
    return run(work)


def test_news_that_follow_each_other_are_one_message() -> None:
    steps = [(1.0, "a"), (1.001, "b"), (1.002, "b"), (1.003, "c"), (2.0, "a")]
    heard = told(*((moment, lambda subscriber, model=model: subscriber.note(model, pending=False)) for moment, model in steps))
    assert heard == [(1.0, ["a"], []), (1.0 + GATHER_SECONDS, ["b", "c"], []), (2.0, ["a"], [])]


def test_a_model_that_comes_to_have_requests_is_told_at_once_and_once() -> None:
    heard = told(
        (1.0, lambda subscriber: subscriber.note("a", pending=False)),
        (1.001, lambda subscriber: subscriber.note("b", pending=True)),
        (1.001, lambda subscriber: subscriber.told([pb.Demand(model="b", held=1)])),
        (1.002, lambda subscriber: subscriber.note("b", pending=True)),
    )
    assert heard == [(1.0, ["a"], []), (1.001, ["b"], []), (1.001 + GATHER_SECONDS, ["b"], [])]


def test_it_is_urgent_again_after_it_had_none() -> None:
    def none(subscriber: Subscriber) -> None:
        subscriber.told([pb.Demand(model="a", in_flight=1)])
        subscriber.told([pb.Demand(model="a")])

    heard = told(
        (1.0, lambda subscriber: subscriber.note("x", pending=False)),
        (1.0, none),
        (1.001, lambda subscriber: subscriber.note("a", pending=True)),
    )
    assert heard == [(1.0, ["x"], []), (1.001, ["a"], [])]


def test_a_push_is_told_at_once_and_so_is_the_end() -> None:
    heard = told(
        (1.0, lambda subscriber: subscriber.note("a", pending=False)),
        (1.001, lambda subscriber: subscriber.pushed("a")),
        (1.002, lambda subscriber: subscriber.end()),
    )
    assert heard == [(1.0, ["a"], []), (1.001, [], ["a"]), (1.002, [], [])]


def test_what_was_posted_is_told_at_once_and_once() -> None:
    post = Post("tenant", "m", "b", 7, 1.0, 60.0)

    async def story() -> tuple[float, list[Post], list[Post]]:
        loop = asyncio.get_running_loop()
        subscriber = Subscriber(loop.time)
        subscriber.note("a", pending=False)
        await subscriber.due()
        began = loop.time()
        subscriber.posted(post)
        _, _, first = await subscriber.due()
        late = loop.time() - began
        subscriber.note("a", pending=False)
        _, _, second = await subscriber.due()
        return late, list(first), list(second)

    work: Coroutine[Any, Any, tuple[float, list[Post], list[Post]]] = story()
    assert run(work) == (0.0, [post], [])
