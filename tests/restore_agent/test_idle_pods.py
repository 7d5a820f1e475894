"""News of engines that sleep become events of the pods that they sleep in, and of no others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from restore_agent.kubernetes.idle_pods import IdlePods
from restore_agent.kubernetes.pod import Metadata, Pod
from restore_agent.sequences.idling import News


class NodePods:
    def __init__(self, *pods: Pod) -> None:
        self.pods = {pod.metadata.uid: pod for pod in pods}
        self.events: list[tuple[str, str, str, str, str]] = []

    async def event(self, pod: Pod, kind: str, reason: str, note: str, action: str) -> None:
        self.events.append((str(pod), kind, reason, note, action))


class Idling:
    def __init__(self) -> None:
        self.tell: Any = None

    @contextlib.contextmanager
    def heard_by(self, callback: Any) -> Iterator[None]:
        self.tell = callback
        yield
        self.tell = None


def news(replica_id: str, reason: str, *, namespace: str = "team", is_bad: bool = False) -> News:
    replica: Any = SimpleNamespace(id=replica_id, namespace=namespace, snapshot=None)
    return News(replica, reason, "why", is_bad)


async def test_each_is_told_of_its_own_pod() -> None:
    pods: Any = NodePods(Pod(Metadata(name="chat.a", namespace="team", uid="1")), Pod(Metadata(name="chat.a", namespace="others", uid="2")))
    idling: Any = Idling()
    async with IdlePods(pods).followed(idling):
        idling.tell(news("chat.a.0123456789ab", "Slept"))
        idling.tell(news("chat.a.0123456789ab", "WakeFailed", is_bad=True))
        idling.tell(news("gone.0123456789ab", "Woken"))
    assert idling.tell is None, "what is told of its events after the block would find no API server"
    slept, failed = ("Normal", "Slept", "why", "Sleep"), ("Warning", "WakeFailed", "why", "Wake")
    assert sorted(pods.events) == [("team/chat.a", *slept), ("team/chat.a", *failed)]
