"""A ModelSnapshot that is new, whose store has its snapshot already: from another cluster, or from before a re-install. It is not captured.

An agent is asked what the store has under the name, and believes nothing that no trusted key has signed. It is taken where it was captured
from the same template and the same ConfigMaps and Secrets (by hashes that the capture pod had, and the manifest keeps), and is then
what one is that all nodes have lost: recovery.py has a node fetch it, and captures where none can. What does not fit is captured, and an
event says why.

Denied is never taken for absent: a store that cannot be asked is asked again, through another node's agent, less and less often. After a
minute it is captured all the same, and an event says so. Meanwhile pods start as they always did. Rejected: to wait for a store however
long it is away, which would keep a model from every snapshot for a wrong name of a bucket.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.agent import Agent, AgentError, AgentUnreachable
from scaler.fleet.messages import Kept
from scaler.fleet.nodes import Nodes
from scaler.kubernetes import resources
from scaler.kubernetes.recovery import candidates
from scaler.kubernetes.resources import IN_STORE, Location, ModelSnapshot, condition
from scaler.kubernetes.snapshot_writer import SnapshotWriter
from zerowake_shared.background import ended
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import Clock
from zerowake_shared.kubernetes.informer import Key
from zerowake_shared.kubernetes.resource import timestamp

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0  # from the first failure until it is captured all the same
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 1.0, 15.0
_HAS_NONE = "not-in-store"
_OF_NO_USE = {"untrusted", "corrupt", "invalid", "no-encryption-key"}  # it would be so again at the next try
_REASONS = {"denied": "StoreDenied", "unreachable": "StoreUnreachable"}


@dataclass(slots=True)
class _Search:
    """Of one object, as often as its store has to be asked. captures: a capture goes ahead; event: reason and note, not told yet."""

    uid: str
    url: str
    backoff: Backoff = field(default_factory=lambda: Backoff(_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS))
    task: asyncio.Task[None] | None = None
    not_before: float = 0.0
    until: float | None = None
    reason: str = "AskingStore"
    message: str = ""
    found: Kept | None = None
    captures: bool = False
    event: tuple[str, str] | None = None


class Finding:
    """Of all objects. `told` is called with the key of an object of which an answer has come."""

    def __init__(self, nodes: Nodes, writer: SnapshotWriter, clock: Clock, told: Callable[[Key], None]) -> None:
        self._nodes = nodes
        self._writer = writer
        self._clock = clock
        self._told = told
        self._searches: dict[Key, _Search] = {}

    async def close(self) -> None:
        await ended([each.task for each in self._searches.values() if each.task])
        self._searches.clear()

    def forget(self, key: Key) -> None:
        """The object is gone."""
        if (search := self._searches.pop(key, None)) and search.task:
            search.task.cancel()

    async def look(self, snapshot: ModelSnapshot, contents: str) -> tuple[bool, float | None]:
        """Whether no capture is to be made now, as the store is asked or has it; and the seconds after which to look again.

        Only for an object that has no snapshot, and while an agent is there. contents: as environment.contents. Raises: ClusterError.
        """
        url, uid = snapshot.spec.store, snapshot.metadata.uid
        search = self._searches.get(snapshot.key)
        if search is None or (search.uid, search.url) != (uid, url):
            self.forget(snapshot.key)
            search = self._searches[snapshot.key] = _Search(uid, url, captures=not url or bool(snapshot.status.digest))
        if search.event:
            await self._writer.event(snapshot, "Warning", *search.event, "Find")
            search.event = None
        if search.found:
            taken = await self._take(snapshot, search.found, contents)
            search.found, search.captures = None, True  # also where it was taken: if no node can fetch it, it is captured
            return taken, None
        if search.captures:
            return False, None
        if search.task is None and search.not_before <= self._clock.now():
            self._ask(snapshot, search)
        await self._writer.not_captured(snapshot, resources.PENDING, search.reason, search.message)
        return True, None if search.task else max(_FIRST_RETRY_SECONDS, search.not_before - self._clock.now())

    def _ask(self, snapshot: ModelSnapshot, search: _Search) -> None:
        agents = [agent for each in candidates(self._nodes, snapshot) if (agent := self._nodes.agent(each))]
        if not agents:
            agents = [agent for node in self._nodes if node.synced and (agent := self._nodes.agent(node.address))]
        if not agents:
            return
        agent = agents[search.backoff.failures % len(agents)]
        name = f"{snapshot.metadata.namespace}/{snapshot.artifact_name}"
        search.message = search.message or f"node {agent.name} asks {search.url} whether it has {name}"
        search.task = asyncio.create_task(self._answered(snapshot.key, search, agent, name), name=f"looking for {name}")

    async def _answered(self, key: Key, search: _Search, agent: Agent, name: str) -> None:
        try:
            search.found = await agent.find(SnapshotName.parse(name), search.url)
        except AgentError as error:
            if error.reason == _HAS_NONE:
                search.captures = True
                log.info("%s is not in %s: it is captured", name, search.url)
            elif error.reason in _OF_NO_USE:
                search.captures = True
                search.event = "NotAdopted", f"what {search.url} has as {name} is of no use here: {error}; it is captured"
            else:
                away = "AgentUnreachable" if isinstance(error, AgentUnreachable) else "StoreNotAsked"
                self._failed(search, _REASONS.get(error.reason, away), f"node {agent.name} could not ask {search.url}: {error}")
        except Exception as error:  # a fault of ours costs a capture, and no model
            log.exception("%s could not be looked for in %s", name, search.url)
            self._failed(search, "StoreNotAsked", f"{search.url} could not be asked: {error}")
        search.task = None
        self._told(key)

    def _failed(self, search: _Search, reason: str, message: str) -> None:
        now = self._clock.now()
        if search.until is None:
            search.until = now + PATIENCE_SECONDS
        search.not_before, search.reason = min(now + search.backoff.next(), max(now, search.until)), reason
        search.message = f"{message}; it is captured if that stays so for {PATIENCE_SECONDS:g} s"
        if now >= search.until:
            search.captures, search.event = True, (reason, f"{message}, for {PATIENCE_SECONDS:g} s: it is captured")
        log.warning("%s: %s", reason, message)

    async def _take(self, snapshot: ModelSnapshot, found: Kept, contents: str) -> bool:
        """Has the object stand for it, if it is of what the object asks for; and tells. Raises: ClusterError."""
        stored = found.stored
        if differs := _difference(snapshot, found, contents):
            note = f"{stored.url} has {stored.digest[:12]} of that name, {differs}: it is captured"
            log.info("%s/%s: %s", *snapshot.key, note)
            await self._writer.event(snapshot, "Warning", "NotAdopted", note, "Find")
            return False
        status = msgspec.structs.replace(
            snapshot.status,
            phase=resources.PENDING,
            digest=stored.digest,
            image_bytes=stored.image_bytes,
            weights_bytes=stored.weights_bytes,
            gpu_bytes=stored.gpu_bytes,
            locations=(Location(stored.url, IN_STORE, stored.digest, timestamp(self._clock.wall())),),
            template_hash=snapshot.template_hash,
            contents_hash=contents,
        )
        why = f"it is in {stored.url}, and on no node yet"
        captured = condition(snapshot, resources.CONDITION_CAPTURED, True, "Found", "", "")
        ready = condition(snapshot, resources.CONDITION_READY, False, "", "NotResident", why)
        await self._writer.status(snapshot, status, captured, ready)
        note = f"{stored.digest[:12]} was found in {stored.url}, of this template and signed by a trusted key: it is fetched, not captured"
        log.info("%s/%s: %s", *snapshot.key, note)
        await self._writer.event(snapshot, "Normal", "Found", note, "Find")
        return True


def _difference(snapshot: ModelSnapshot, found: Kept, contents: str) -> str:
    """Why it is not what would be captured; empty: it is."""
    if not found.template:
        return "and nothing says which template it was captured from"
    if found.template != snapshot.template_hash:
        return f"captured from another template ({found.template}, and this one is {snapshot.template_hash})"
    if found.contents != contents:
        return "captured with other ConfigMaps or Secrets behind its environment than this cluster has"
    return ""
