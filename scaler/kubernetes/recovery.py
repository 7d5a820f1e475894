"""A snapshot that no node has, any more or yet, and its store has: one node fetches it, and it is not captured again.

The first node is the one that a capture would have gone to; whether the snapshot fits there its agent says before it fetches anything, and
then the next is asked. Where none takes it, or the store fails three of them, a capture is what is left, as where there is no store. But
where a node's disk is full of what is worth as much, it is asked again later: a capture would find no more room, or take another's. The
plan does not do this: it spreads what a node has, and where nobody has anything its answer would be a capture, which is no plan's either.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.agent import AgentError
from scaler.fleet.nodes import Nodes
from scaler.kubernetes.declarations import planned
from scaler.kubernetes.resources import ModelSnapshot
from scaler.plan.policy import prefer_for_capture
from scaler.plan.rungs import Rung
from scaler.plan.world import Node, World
from zerowake_shared.background import ended
from zerowake_shared.backoff import Backoff
from zerowake_shared.kubernetes.informer import Key

log = logging.getLogger(__name__)

_STORE_FAILURES = 3  # of different nodes, until the store is given up
_NO_ROOM = "store-full"  # a node's own disk: nothing is put into the store here
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 30.0, 1800.0
_OF_STORE = {"denied", "unreachable", "untrusted", "corrupt", "not-in-store", "invalid"}


@dataclass(slots=True)
class Recovering:
    """How far it is. message: what is done, or why it failed; failed: it is to be captured."""

    url: str
    digest: str
    task: asyncio.Task[None] | None = None
    message: str = "no restore agent is connected on a node that takes its pods, which could fetch it"
    failed: bool = False


class Recovery:
    """Of all objects. `told` is called with the key of an object of which a fetch has ended."""

    def __init__(self, nodes: Nodes, told: Callable[[Key], None]) -> None:
        self._nodes = nodes
        self._told = told
        self._under_way: dict[Key, Recovering] = {}

    async def close(self) -> None:
        await ended([each.task for each in self._under_way.values() if each.task])
        self._under_way.clear()

    def forget(self, key: Key) -> None:
        """A node has it, or the object is gone."""
        if (found := self._under_way.pop(key, None)) and found.task:
            found.task.cancel()

    def state(self, snapshot: ModelSnapshot) -> Recovering | None:
        """Of an object whose snapshot no node has; a fetch begins here. None: its store does not have it either."""
        stored = snapshot.stored
        if stored is None:
            self.forget(snapshot.key)
            return None
        found = self._under_way.get(snapshot.key)
        if found is None or (found.url, found.digest) != (stored.name, stored.digest):
            self.forget(snapshot.key)
            found = self._under_way[snapshot.key] = Recovering(stored.name, stored.digest)
        if found.task is None and not found.failed and candidates(self._nodes, snapshot):
            found.task = asyncio.create_task(self._fetch(found, snapshot), name=f"fetching {snapshot.artifact_name}")
            found.message = f"no node has it; it is fetched from {found.url}"
        return found

    async def _fetch(self, found: Recovering, snapshot: ModelSnapshot) -> None:
        name = SnapshotName(snapshot.metadata.namespace, snapshot.artifact_name)
        backoff = Backoff(_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS)
        try:
            while failures := await self._ask(found, name, candidates(self._nodes, snapshot)):
                found.message = f"{found.url} has it, and no node could take it from there: {'; '.join(why for why, _ in failures)}"
                if not any(reason == _NO_ROOM for _, reason in failures):
                    found.failed = True
                    return
                self._told(snapshot.key)
                await asyncio.sleep(backoff.next())
        except Exception as error:  # a fault of ours costs a capture, and no model
            log.exception("%s could not be fetched from %s", name, found.url)
            found.failed, found.message = True, f"it could not be fetched from {found.url}: {error}"
        finally:
            found.task = None
            self._told(snapshot.key)

    async def _ask(self, found: Recovering, name: SnapshotName, addresses: Sequence[str]) -> list[tuple[str, str]]:
        """Why each node that was asked did not take it, and the reason's key; nothing: one has it."""
        failures: list[tuple[str, str]] = []
        for address in addresses:
            agent = self._nodes.agent(address)
            if agent is None:
                continue
            try:
                await agent.stage(name, found.digest, Rung.DISK, (), (found.url,))
                log.info("%s is on %s again, from %s", name, agent.name, found.url)
                return []
            except AgentError as error:
                failures.append((f"node {agent.name}: {error}", error.reason))
                log.warning("%s could not be fetched from %s: %s", name, found.url, failures[-1][0])
                if sum(reason in _OF_STORE for _, reason in failures) >= _STORE_FAILURES:
                    break
        return failures or [("no agent is there", "")]


def candidates(nodes: Iterable[Node], snapshot: ModelSnapshot) -> list[str]:
    """Addresses of the agents that are asked for it, in order: that of a capture."""
    nodes = tuple(nodes)
    by_name = {node.name: node for node in nodes if node.synced and node.name}
    preferred = prefer_for_capture(World(now=0.0, models={}, nodes=nodes), planned(snapshot)).seconds
    return [by_name[name].address for name in preferred if name in by_name]
