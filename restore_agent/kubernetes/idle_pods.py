"""What is told of engines that sleep in pods, where their owner looks: events of the pod."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Literal

from restore_agent.kubernetes.node_pods import NodePods
from restore_agent.kubernetes.pod import Pod
from restore_agent.sequences.idling import Idling, News
from zerowake_shared.background import told

_LOG = logging.getLogger("zerowake.agent")


class IdlePods:
    """Use `async with idle_pods.followed(idling)`."""

    def __init__(self, node_pods: NodePods) -> None:
        self._node_pods = node_pods
        self._telling: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def followed(self, idling: Idling) -> AsyncIterator[None]:
        """At the end of the block everything that was heard is told."""
        try:
            with idling.heard_by(self._heard):
                yield
        finally:
            await asyncio.gather(*self._telling, return_exceptions=True)

    def _heard(self, news: News) -> None:
        if (pod := self._pod(news)) is None:
            return  # it went meanwhile
        kind: Literal["Normal", "Warning"] = "Warning" if news.is_bad else "Normal"
        action = "Sleep" if news.reason in ("Slept", "StaysAwake") else "Wake"
        task = asyncio.create_task(self._node_pods.event(pod, kind, news.reason, news.text, action), name=f"{news.reason} of pod {pod}")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)
        told(task, _LOG)

    def _pod(self, news: News) -> Pod | None:
        """By the replica's id, which begins with the pod's name (zerowake_shared/pod_contract.py)."""
        replica = news.replica
        namespace = replica.snapshot.manifest.namespace if replica.snapshot else replica.namespace
        name = replica.id.rpartition(".")[0]
        return next(
            (pod for pod in self._node_pods.pods.values() if (pod.metadata.namespace, pod.metadata.name) == (namespace, name)), None
        )
