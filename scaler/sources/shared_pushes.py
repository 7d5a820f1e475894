"""Demand that was posted at one replica of the scaler, known to all of them: it counts once at each, and goes on when one of them dies.

Whoever posts reaches one replica, by chance, and KEDA asks another. So each tells the others what it was told, with a stamp, and keeps
what they tell, by who posted it. Of one poster's posts the latest counts: a stamp is the moment, and later than any that is known of him,
so that clocks which differ make no earlier post the later one. A replica that comes up is told of all that counts still.
Rejected: each replica as a source of its own (the same poster would count twice when his next connection is another replica's).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace

from scaler.fleet.peers import Peers
from scaler.fleet.post import Post
from scaler.sources.push_declaration import PushDeclaration
from scaler.sources.source import Declaration, Reading
from scaler.sources.watch import Sources
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_LEAST = 1e-3  # seconds between two stamps of one poster


class SharedPushes:
    """Told in place of the sources. owner: whose namespace a model is."""

    def __init__(self, sources: Sources, peers: Peers, owner: Callable[[str], str], clock: Clock = SYSTEM_CLOCK) -> None:
        self._sources = sources
        self._peers = peers
        self._owner = owner
        self._clock = clock
        self._posts: dict[tuple[str, str, str], tuple[Post, float]] = {}  # each with the moment at which it ends
        peers.posts = lambda: [*self._counting()]
        peers.on_post = self._heard

    def told(self, model: str, declared: Declaration, reading: Reading, hold_seconds: float) -> bool:
        """As Sources have it."""
        assert isinstance(declared, PushDeclaration)
        if not self._sources.told(model, declared, reading, hold_seconds):
            return False
        namespace = self._owner(model)
        before = self._posts.get((namespace, model, declared.by))
        stamp = max(self._clock.wall(), before[0].stamp + _LEAST if before else 0.0)
        post = Post(namespace, model, declared.by, reading.pending, stamp, hold_seconds)
        self._keep(post)
        self._peers.posted(post)
        return True

    def misled(self, model: str, declared: Declaration, why: str) -> None:
        self._sources.misled(model, declared, why)

    def declared(self, model: str) -> None:
        """The model's sources were declared anew: what was posted before counts on."""
        for post in self._counting():
            if post.model == model:
                self._tell(post)

    def _heard(self, post: Post) -> None:
        before = self._posts.get((post.namespace, post.model, post.by))
        if before is None or (post.stamp, post.pending) > (before[0].stamp, before[0].pending):
            self._keep(post)
            self._tell(post)

    def _keep(self, post: Post) -> None:
        now = asyncio.get_running_loop().time()
        self._posts = {key: each for key, each in self._posts.items() if each[1] > now}
        self._posts[post.namespace, post.model, post.by] = post, now + post.seconds

    def _tell(self, post: Post) -> None:
        """A replica may hear of it before it hears of the model."""
        if self._owner(post.model) == post.namespace:
            self._sources.told(post.model, PushDeclaration(type="push", by=post.by), Reading(post.pending), post.seconds)

    def _counting(self) -> Iterator[Post]:
        """With what is left of their time."""
        now = asyncio.get_running_loop().time()
        return (replace(post, seconds=until - now) for post, until in list(self._posts.values()) if until > now)
