"""Whether a replica is sent requests: what its node's agent says of it and what its pod's status says, joined.

An agent knows first: it restored the engine, and it sees its end. But agents come and go, and some nodes have none, while
Kubernetes goes on saying which pods are ready. Both name a replica by the same id (zerowake_shared/pod_contract.py), so two words about one
engine are one replica, whichever came first. The rules, the first that applies:

- the agent has said that it ended: it is gone, whatever the pod's status says, which is older;
- either says that it leaves: nothing new, and what runs ends by itself;
- the agent says that it sleeps: it has to be woken first, whatever the kubelet's probes make of that;
- the pod was ready and is not any more: nothing new either;
- the agent says that it is ready: it serves, before the kubelet has asked it for the first time;
- no agent speaks of it: the pod's own readiness decides. One that is not ready yet, but served by an agent's word, is left alone;
- nobody speaks of it, and nobody has said that it ended: it is lost, gets nothing new, and what runs there goes on to its end.

Rejected: a node's agent speaking for all pods of the node (those that were made while it was away have no placeholder, so it never names
them), and replicas of pods beside those of agents (requests would count twice against one engine's places).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from scaler.gateway.dispatcher import Backend, Dispatcher


class AgentWord(enum.Enum):
    """The last that an agent said of a replica."""

    READY = "ready"
    IDLE = "idle"
    RETIRING = "retiring"
    FAILING = "failing"
    ENDED = "ended"


class PodWord(enum.Enum):
    """What the status of a replica's pod comes to. STARTING: it was not ready so far; UNREADY: it was, and is not any more."""

    STARTING = "starting"
    READY = "ready"
    UNREADY = "unready"
    LEAVING = "leaving"
    GONE = "gone"


class Standing(enum.Enum):
    """What follows from both words. SLEEPS: it serves once it was woken. RESTS: nothing new is sent to it for now. FAILS: and what has no
    answer so far is ended. LOST: nothing new, and it is not counted; it may live, though. UNKNOWN: it is left as it is, served or not."""

    SERVES = "serves"
    SLEEPS = "sleeps"
    RESTS = "rests"
    FAILS = "fails"
    LOST = "lost"
    GONE = "gone"
    UNKNOWN = "unknown"


@dataclass(slots=True)
class _Words:
    """What was said of one replica."""

    backend: Backend | None = None
    agent: AgentWord | None = None
    pod: PodWord | None = None


class Readiness:
    """Both words of every replica; what follows from them is told to the dispatcher at once. An unknown id changes nothing."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._words: dict[str, _Words] = {}

    # --- what agents say

    def agent_ready(self, backend: Backend) -> None:
        """The replica serves. Where its pod's status led somewhere else, the agent is right."""
        words = self._words.setdefault(backend.id, _Words())
        words.backend, words.agent = backend, AgentWord.READY
        self._settle(backend.id, words)

    def agent_finds_asleep(self, backend: Backend) -> None:
        """The replica sleeps in its pod, or is about to."""
        words = self._words.setdefault(backend.id, _Words())
        words.backend, words.agent = backend, AgentWord.IDLE
        self._settle(backend.id, words)

    def agent_retires(self, replica_id: str) -> None:
        """It finishes what it has."""
        self._agent_said(replica_id, AgentWord.RETIRING)

    def agent_finds_failing(self, replica_id: str) -> None:
        """It does not answer its health check."""
        self._agent_said(replica_id, AgentWord.FAILING)

    def agent_ended(self, replica_id: str) -> None:
        """The engine has ended: whoever else names it speaks of the past."""
        self._agent_said(replica_id, AgentWord.ENDED)

    def agent_silent(self, replica_id: str) -> None:
        """No agent speaks of it any more, or it must not: nobody has said that it ended."""
        self._agent_said(replica_id, None)

    def named_by_agent(self, replica_id: str) -> bool:
        words = self._words.get(replica_id)
        return words is not None and words.agent is not None

    def _agent_said(self, replica_id: str, said: AgentWord | None) -> None:
        words = self._words.get(replica_id)
        if words is not None:
            words.agent = said
            self._settle(replica_id, words)

    def node_silent(self, node: str) -> None:
        """Nothing is heard of the node's agent: its replicas are looked at, and serve if they answer."""
        self._dispatcher.suspects.doubt(node)

    # --- what pods' status says

    def pod_is(self, backend: Backend, said: PodWord) -> None:
        """The status of the pod that the replica runs in."""
        words = self._words.setdefault(backend.id, _Words())
        if words.agent is None:
            words.backend = backend
        words.pod = said
        self._settle(backend.id, words)

    def pod_gone(self, replica_id: str) -> None:
        """The pod, or its container, is not there any more."""
        if words := self._words.get(replica_id):
            words.pod = PodWord.GONE
            self._settle(replica_id, words)

    def pod_silent(self, replica_id: str) -> None:
        """The pod's status is not to be heeded any more, though its container runs: it serves the model no more."""
        if words := self._words.get(replica_id):
            words.pod = None
            self._settle(replica_id, words)

    # --- what follows

    def _settle(self, replica_id: str, words: _Words) -> None:
        standing = _standing(words)
        if standing in (Standing.SERVES, Standing.SLEEPS) and words.backend is not None:
            self._dispatcher.add(words.backend, asleep=standing is Standing.SLEEPS)
            self._dispatcher.resume(replica_id)
        elif standing is Standing.RESTS:
            self._dispatcher.retire(replica_id)
        elif standing is Standing.FAILS:
            self._dispatcher.give_up(replica_id)
        elif standing is Standing.GONE:
            self._dispatcher.remove(replica_id)
            if words.pod in (None, PodWord.GONE):
                del self._words[replica_id]
        elif standing is Standing.LOST:
            self._dispatcher.let_go(replica_id)
            del self._words[replica_id]


_FIRST = {AgentWord.ENDED: Standing.GONE, AgentWord.FAILING: Standing.FAILS}  # whatever the pod's status says


def _standing(words: _Words) -> Standing:
    if words.pod is PodWord.GONE and words.agent is not AgentWord.ENDED:
        return Standing.GONE if words.agent is None else Standing.RESTS
    if words.agent in _FIRST:
        return _FIRST[words.agent]
    if words.agent is AgentWord.RETIRING or words.pod is PodWord.LEAVING:
        return Standing.RESTS
    if words.agent is AgentWord.IDLE:
        return Standing.SLEEPS
    return _by_pod(words)


def _by_pod(words: _Words) -> Standing:
    """Where its agent says no more than that it is ready, if that."""
    if words.pod is PodWord.UNREADY:
        return Standing.RESTS
    if words.agent is AgentWord.READY or words.pod is PodWord.READY:
        return Standing.SERVES
    return Standing.LOST if words.pod is None else Standing.UNKNOWN
