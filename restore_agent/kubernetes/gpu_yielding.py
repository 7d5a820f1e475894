"""A GPU that the kubelet gives to somebody else's pod is given back by gpumem at once, and held again when that pod has gone.

gpumem holds memory of GPUs that no pod has asked for, and so do parked engines, which become standbys then. Which pod has which is known to
the kubelet alone (pod_gpus.py), which can be asked and tells nothing by itself. So it is asked when the API server says that a pod which
wants a device, or has a claim, was sent to this node, again every few milliseconds until that pod has its devices (its container is made
only afterwards), when a pod goes, and now and then in any case: that also brings a gpumem that was started anew back into line. A device
plugin of our own was rejected: the GPUs would be ours to advertise, and every other one would have to go.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from pathlib import Path
from typing import Any

from prometheus_client import Gauge

from gpumem.client.control import Control
from gpumem.wire.errors import GpumemError
from restore_agent.kubernetes.node_pods import NodePods
from restore_agent.kubernetes.pod import Pod
from restore_agent.kubernetes.pod_gpus import PodGpus, wants_devices
from restore_agent.kubernetes.pod_resources import KubeletError
from zerowake_shared import durable
from zerowake_shared.background import beside
from zerowake_shared.pod_contract import CAPTURE, SNAPSHOT, is_lent_to

_FAST_SECONDS = 0.02  # between two looks while a pod waits for its devices
_PATIENCE_SECONDS = 60.0  # for which that goes on
_SLOW_SECONDS = 5.0
_LOG = logging.getLogger("zerowake.agent")
_YIELDED = Gauge("zerowake_yielded_devices", "GPUs that were given back because the kubelet gave them to another's pod")


class GpuYielding:
    """Which of gpumem's devices are another's now, and what is to be held of them again. Use `async with GpuYielding.watching(…)`."""

    def __init__(
        self,
        node_pods: NodePods,
        gpus: PodGpus,
        gpumem: Path,
        note: Path,
        others_have: Callable[[Collection[str]], Coroutine[Any, Any, None]],
    ) -> None:
        self._node_pods = node_pods
        self._gpus = gpus
        self._gpumem = gpumem
        self._note = note
        self._others_have = others_have
        self._before = _noted(note)  # device → bytes that it held
        self._look = asyncio.Event()
        self._waiting: dict[str, float] = {}  # uid of a pod that has no devices yet → until when it is looked for
        self._troubled = ""

    @classmethod
    @contextlib.asynccontextmanager
    async def watching(
        cls,
        node_pods: NodePods,
        gpus: PodGpus,
        gpumem: Path,
        state: Path,
        others_have: Callable[[Collection[str]], Coroutine[Any, Any, None]],
    ) -> AsyncIterator[None]:
        """`gpumem`: its socket. `state`: the agent's folder. `others_have`: told of all GPUs of others' pods, each time that they were
        looked at; what it cannot have given back, it says itself."""
        yielding = cls(node_pods, gpus, gpumem, state / "yielded.json", others_have)
        node_pods.on_change(yielding._changed)
        async with beside(yielding._run(), "GPU yielding"):
            yield

    def _changed(self, pod: Pod, gone: bool) -> None:
        uid = pod.metadata.uid
        if gone or pod.is_leaving:
            self._waiting.pop(uid, None)
            self._look.set()
        elif _wants_devices(pod) and uid not in self._waiting and not _is_ours(pod):
            self._waiting[uid] = asyncio.get_running_loop().time() + _PATIENCE_SECONDS
            self._look.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._look.clear()
            try:
                foreign = await self._devices()
                vacating = asyncio.create_task(self._others_have(foreign), name="parked engines give way")
                try:
                    await self._align(foreign)
                finally:
                    await vacating
                self._troubled = ""
            except (KubeletError, GpumemError, OSError) as error:
                said = str(error)
                if said != self._troubled:  # where there is no gpumem, once is enough
                    _LOG.info("GPUs are not yielded to other pods: %s", said)
                self._troubled = said
            soon = not self._troubled and any(until > loop.time() for until in self._waiting.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FAST_SECONDS if soon else _SLOW_SECONDS):
                    await self._look.wait()

    async def _devices(self) -> set[str]:
        """Those of pods that are not ours. Raises KubeletError."""
        held = await self._gpus.held()
        pods = {(pod.metadata.namespace, pod.metadata.name): pod for pod in self._node_pods.pods.values()}
        found: set[str] = set()
        for name, devices in held.items():
            pod = pods.get(name)
            if pod and (pod.status.phase == "Running" or not _has_claims(pod)):  # claims are prepared after it has the other devices
                self._waiting[pod.metadata.uid] = 0.0
            if pod is None or not _is_ours(pod):
                found |= devices
        return found

    async def _align(self, foreign: set[str]) -> None:
        """Raises GpumemError, OSError."""
        if not foreign and not self._before:
            return
        async with Control.connected(self._gpumem, "restore agent") as control:
            for device in (await control.status()).devices:
                name = device.identity
                if name in foreign and device.wanted_bytes:
                    await self._keep(name, max(device.wanted_bytes, self._before.get(name, 0)))
                    left = await control.reserve(name, 0)
                    _LOG.info("%s is another pod's now: gpumem gave %d MiB of it back", name, (device.wanted_bytes - left) >> 20)
                    if left:
                        _LOG.warning("%d MiB of %s are still lent to replicas, until they end", left >> 20, name)
                elif name not in foreign and name in self._before:
                    held = await control.reserve(name, self._before[name])
                    _LOG.info("%s is free again: gpumem holds %d MiB of it", name, held >> 20)
                    await self._keep(name, 0)
        _YIELDED.set(len(self._before))

    async def _keep(self, device: str, size: int) -> None:
        """Written down: an agent that is started anew has to know what to hold again."""
        if size:
            self._before[device] = size
        else:
            self._before.pop(device, None)
        await asyncio.to_thread(durable.replace, self._note, json.dumps(self._before).encode())


def _noted(note: Path) -> dict[str, int]:
    """What `_keep` wrote. A note that says nothing sensible costs memory that is held no more, not an agent that cannot start."""
    text = durable.content(note)
    try:
        return {str(device): int(size) for device, size in dict(json.loads(text)).items()} if text is not None else {}
    except (ValueError, TypeError) as error:
        _LOG.warning(
            "%s cannot be read (%s): of GPUs that other pods have, gpumem holds nothing again unless `gpumem reserve` is told", note, error
        )
        return {}


def _is_ours(pod: Pod) -> bool:
    """One that gpumem lends to: its engine is restored, or started to be captured, for which it has the other label in that one's place.
    One that the webhook left as it is, or whose engine was started by a command that knows nothing of gpumem, takes memory as any other."""
    metadata = pod.metadata
    return is_lent_to(metadata.annotations) and any(metadata.labels.get(label) for label in (SNAPSHOT, CAPTURE))


def _wants_devices(pod: Pod) -> bool:
    return any(map(wants_devices, pod.spec.containers))


def _has_claims(pod: Pod) -> bool:
    return any(container.resources.claims for container in pod.spec.containers)
