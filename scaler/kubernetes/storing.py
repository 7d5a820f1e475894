"""Snapshots on their way into the stores that their owners name: pushed by an agent that has them, in the background, until they are there.

A model serves whether its snapshot is stored or not. So nothing here is waited for: each look at an object asks how far its push is, and
the end of a push brings the next look. A push that failed is tried again, less and less often, by the next node that has the snapshot; the
agent goes on where the last one stopped. What has been stored is in the object's status, so that the next leader does not begin anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.agent import Agent, AgentError, AgentUnreachable
from scaler.fleet.nodes import Nodes
from scaler.kubernetes.artifact import Artifact
from scaler.kubernetes.resources import CONDITION_STORED, IN_STORE, Condition, Location, ModelSnapshot
from zerowake_shared.background import ended
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import Clock
from zerowake_shared.kubernetes.informer import Key
from zerowake_shared.kubernetes.resource import timestamp

log = logging.getLogger(__name__)

FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 5.0, 600.0
STORED = "Stored"
_REASONS = {
    "denied": "Denied",
    "unreachable": "Unreachable",
    "store-full": "Full",
    "untrusted": "Untrusted",
    "corrupt": "Corrupt",
    "invalid": "InvalidStore",
}


@dataclass(slots=True)
class _Push:
    """One snapshot into one store, however many tries that takes. told: whether its last end was told as an event."""

    url: str
    digest: str
    backoff: Backoff = field(default_factory=lambda: Backoff(FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS))
    task: asyncio.Task[None] | None = None
    node: str = ""
    not_before: float = 0.0
    reason: str = ""
    message: str = ""
    since: str = ""
    told: bool = True


@dataclass(frozen=True, slots=True)
class StoredState:
    """Whether an object's snapshot is in its store. location: the store, once it is there; event: reason and note that are new; wait:
    seconds until something is to be done."""

    condition: Condition
    location: Location | None = None
    event: tuple[str, str] | None = None
    wait: float | None = None


class Storing:
    """The pushes of all objects. `told` is called with the key of an object of which one has ended."""

    def __init__(self, nodes: Nodes, clock: Clock, told: Callable[[Key], None]) -> None:
        self._nodes = nodes
        self._clock = clock
        self._told = told
        self._pushes: dict[Key, _Push] = {}

    async def close(self) -> None:
        """Ends what is under way. What an agent has sent stays in the store."""
        await ended([push.task for push in self._pushes.values() if push.task])
        self._pushes.clear()

    def forget(self, key: Key) -> None:
        """The object is gone, or names no store."""
        if (push := self._pushes.pop(key, None)) and push.task:
            push.task.cancel()

    def state(self, snapshot: ModelSnapshot, artifact: Artifact, digest: str, usable: Sequence[str]) -> StoredState | None:
        """Of an object, whose push begins or is tried again here if it is due. None: it names no store. usable: the nodes that have it."""
        url, kept = snapshot.spec.store, snapshot.status.stored
        if not url or not digest:
            self.forget(snapshot.key)
            return None
        if kept and (kept.name, kept.digest) == (url, digest):
            push = self._pushes.pop(snapshot.key, None)
            event = (STORED, push.message) if push and not push.told else None
            return StoredState(_condition(snapshot, STORED, f"in {url} since {kept.since}", holds=True), kept, event)
        push = self._pushes.get(snapshot.key)
        if push is None or (push.url, push.digest) != (url, digest):
            self.forget(snapshot.key)
            push = self._pushes[snapshot.key] = _Push(url, digest)
        if push.since:
            location = Location(url, IN_STORE, digest, push.since)
            event, push.told = (None if push.told else (STORED, push.message)), True
            return StoredState(_condition(snapshot, STORED, f"in {url} since {push.since}", holds=True), location, event)
        if push.task is None and push.not_before <= self._clock.now():
            self._begin(snapshot, push, artifact, usable)
        if not push.reason:
            why = f"node {push.node} puts it into {url}" if push.task else "no node that can be asked has it"
            return StoredState(_condition(snapshot, "Pushing" if push.task else "NoHolder", why))
        event, push.told = (None if push.told else ("NotStored", f"{push.reason}: {push.message}")), True
        wait = None if push.task else max(0.0, push.not_before - self._clock.now())
        return StoredState(_condition(snapshot, push.reason, push.message), event=event, wait=wait)

    def _begin(self, snapshot: ModelSnapshot, push: _Push, artifact: Artifact, usable: Sequence[str]) -> None:
        asked = [name for name in usable if name in artifact.answering]
        if not asked:
            return
        push.node = asked[push.backoff.failures % len(asked)]
        agent = self._nodes.agent(artifact.answering[push.node].address)
        if agent is not None:
            push.task = asyncio.create_task(self._push(snapshot.key, push, agent, artifact.name), name=f"storing {artifact.name}")

    async def _push(self, key: Key, push: _Push, agent: Agent, name: SnapshotName) -> None:
        try:
            seconds = await agent.push(name, push.digest, push.url)
        except AgentError as error:
            reason = "AgentUnreachable" if isinstance(error, AgentUnreachable) else _REASONS.get(error.reason, "PushFailed")
            self._failed(push, reason, error)
        except Exception as error:  # a fault of ours is not tried again at once either
            log.exception("%s could not be stored in %s", name, push.url)
            self._failed(push, "PushFailed", error)
        else:
            push.since, push.told = timestamp(self._clock.wall()), False
            push.message = f"{push.digest[:12]} is in {push.url}: node {push.node} put it there in {seconds:.1f} s"
            log.info("%s: %s", name, push.message)
        push.task = None
        self._told(key)

    def _failed(self, push: _Push, reason: str, error: Exception) -> None:
        pause = push.backoff.next()
        before, push.reason = push.reason, reason
        push.not_before = self._clock.now() + pause
        push.message = f"node {push.node} could not put it into {push.url}: {error}; it is tried again in {pause:.0f} s"
        push.told = before == reason  # an event for each reason, not for each try
        log.warning("%s: %s", reason, push.message)


def _condition(snapshot: ModelSnapshot, reason: str, message: str, *, holds: bool = False) -> Condition:
    status = "True" if holds else "False"
    return Condition(CONDITION_STORED, status, reason, message, observed_generation=snapshot.metadata.generation)
