"""Snapshots of pods: taken of a pod that the controller made for it, and answered in the pod's annotations, which the controller waits for.

a placeholder calls  →  may it?  →  start, dump, prove in place, publish  →  annotation with the digest, or with why not

An engine that we have an adapter for is started with it here, and only here, where gpumem lends to its pod: what is restored later is what
was started here. So its pods say what a stock image wants to hear, and start by that alone wherever nothing can be restored.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from restore_agent.engine.engine import EngineError
from restore_agent.engine.presets import Setting, adapted, prepare, unadapted
from restore_agent.errors import FAILURES, ErrorKind, kind_of
from restore_agent.kubernetes.calling_pod import CallingPod
from restore_agent.kubernetes.injection import gpumem_socket
from restore_agent.kubernetes.node_pods import NodePods
from restore_agent.kubernetes.pod import Pod
from restore_agent.kubernetes.pod_gpus import PodGpus
from restore_agent.kubernetes.pod_log import last_lines
from restore_agent.places.output import in_short
from restore_agent.sequences.capture import CaptureRequest
from restore_agent.sequences.node import Node
from restore_agent.sequences.phases import Phases
from restore_agent.snapshots.manifest import EngineRecord, TemplateRecord, check_name
from zerowake_shared.backoff import Backoff
from zerowake_shared.kubernetes.errors import ClusterError
from zerowake_shared.kubernetes.note import fitted
from zerowake_shared.pod_contract import CAPTURE, CAPTURE_FAILED, CAPTURE_MISSED, CAPTURE_REFUSED, CAPTURED, CONTENTS, GPUMEM, TEMPLATE

_FIRST_PAUSE, _LAST_PAUSE = 1.0, 30.0  # between two tries to annotate a pod
_EXIT_SECONDS = 1.0
_CHECKPOINTS = Path("/tmp/zerowake-weights")  # in the container; what an adapter writes there becomes a part of the snapshot
_LOG = logging.getLogger("zerowake.agent")


class PodCaptures:
    """Takes snapshots of pods; each pod of them ends with its answer."""

    def __init__(self, node: Node, node_pods: NodePods, gpus: PodGpus) -> None:
        self._node = node
        self._node_pods = node_pods
        self._gpus = gpus

    async def capture(self, caller: CallingPod) -> None:
        """The container exits with 0 where there is a snapshot, else with 1. Raises PlaceholderError: it is gone."""
        pod, phases = caller.pod, Phases()
        if _answered(pod):
            caller.placeholder.exit(0 if caller.annotation(CAPTURED) else 1)
            return
        name = pod.metadata.labels[CAPTURE]

        def progress(phase: str, done: int, total: int) -> None:
            if not done:
                _LOG.info("snapshot %s/%s of pod %s: %s", pod.metadata.namespace, name, pod, phase)

        try:
            caller.check_allowed()
            caller.container.gpus = await self._gpus.of(caller)
            path, body = caller.canary()
            template = caller.annotation(TEMPLATE)
            request = CaptureRequest(
                namespace=check_name("namespace", pod.metadata.namespace),
                name=check_name("name", name),
                model=caller.model,
                engine=await self._engine(caller),
                canary_path=path,
                canary_body=body,
                adapters=caller.names(),
                replace=True,
                template=TemplateRecord(hash=template, contents=caller.annotation(CONTENTS)) if template else None,
            )
            captured = await self._node.capture(request, progress, phases, caller.container.open)
        except FAILURES as error:
            if caller.placeholder.ended.done() and pod.metadata.uid not in self._node_pods.pods:
                return  # it was deleted meanwhile
            again = kind_of(error) is not ErrorKind.INVALID
            why = str(error)
            if isinstance(error, EngineError) and (said := in_short(await last_lines(caller.about.log))):
                why += f". It printed: {said}"
            await self._failed(pod, why, {} if again else {CAPTURE_REFUSED: "true"})
            code = 1
        else:
            manifest = captured.snapshot.manifest
            if manifest.is_of_pod:
                await asyncio.to_thread(self._node.store.managed.add, captured.snapshot.digest)
                self._node.changes.tell(captured.snapshot)
            sizes = f"{manifest.image_bytes / 1e6:.0f} MB, of which CRIU restores {manifest.criu_bytes / 1e6:.1f} MB"
            if manifest.written_bytes:
                sizes += f" and {manifest.written_bytes / 1e6:.1f} MB are files that the engine had written"
            if manifest.weights:
                sizes += f"; {sum(each.size for each in manifest.weights) / 1e6:.0f} MB of weights are lent by gpumem"
            if manifest.adapters:
                sizes += f"; proved with its adapters {', '.join(adapter.name for adapter in manifest.adapters)}"
            if caller.container.contents.left_behind:
                sizes += f"; not carried, since it is too much, and empty in other pods: {', '.join(caller.container.contents.left_behind)}"
            sizes = "; ".join([sizes, *captured.notes])
            await self._node_pods.event(pod, "Normal", "Captured", f"{captured.snapshot} in {phases.total:.1f} s: {sizes}", "Capture")
            await self._annotate(pod, {CAPTURED: captured.snapshot.digest})
            code = 0
        if not caller.placeholder.ended.done():
            caller.placeholder.exit(code)
            await asyncio.wait([caller.placeholder.ended], timeout=_EXIT_SECONDS)

    async def _engine(self, caller: CallingPod) -> EngineRecord:
        """Raises Refused, UnsuitableCommand, ContainerError."""
        record = caller.record(caller.placeholder.command)
        if not caller.is_lent_to:
            return record
        kind = adapted(record.command)
        if not kind:
            if why := unadapted(record.command):
                note = f"it is captured without what lends its weights from gpumem, and they are in its image: {why}"
                _LOG.warning("pod %s: %s", caller.pod, note)
                await self._node_pods.event(caller.pod, "Warning", "NotAdapted", note, "Capture")
                await self._annotate(caller.pod, {GPUMEM: "false"})  # it takes the GPU's own memory: gpu_yielding.py
            return record
        setting = Setting(record.port, gpumem_socket(self._node.weights.socket), _CHECKPOINTS, has_network=True)
        command, env, _ = prepare(kind, record.command, setting, {})
        own = caller.container.environment()
        env = {name: value for name, value in env.items() if name not in own}
        return record.model_copy(update={"command": tuple(command), "env": env})

    async def missed(self, pod: Pod) -> None:
        """Its container runs the command itself, so that no snapshot can be taken of it."""
        if not _answered(pod):
            why = "its container was made while this node's agent was not connected to the container runtime"
            await self._failed(pod, why, {CAPTURE_MISSED: "true"})

    async def _failed(self, pod: Pod, why: str, more: Mapping[str, str] = MappingProxyType({})) -> None:
        _LOG.error("no snapshot %s/%s of pod %s: %s", pod.metadata.namespace, pod.metadata.labels[CAPTURE], pod, why)
        await self._node_pods.event(pod, "Warning", "CaptureFailed", why, "Capture")
        await self._annotate(pod, {CAPTURE_FAILED: fitted(why, 2000), **more})

    async def _annotate(self, pod: Pod, annotations: Mapping[str, str]) -> None:
        """Until it is written: the controller waits for it. A pod that is gone needs none."""
        backoff = Backoff(_FIRST_PAUSE, _LAST_PAUSE)
        while True:
            try:
                await self._node_pods.annotate(pod, annotations)
                return
            except ClusterError as error:
                if error.status in (404, 409, 422):
                    return
                pause = backoff.next()
                _LOG.warning("pod %s is not annotated yet, again in %.0f s: %s", pod, pause, error)
            await asyncio.sleep(pause)


def _answered(pod: Pod) -> bool:
    return bool(pod.metadata.annotations.get(CAPTURED) or pod.metadata.annotations.get(CAPTURE_FAILED))
