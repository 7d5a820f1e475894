"""The agent's part on Kubernetes, wired together. A module of its own, since the API's client takes longer to import than all the rest."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from restore_agent.kubernetes import engine_packages, nri
from restore_agent.kubernetes.adoption import Adoption
from restore_agent.kubernetes.cri import Cri
from restore_agent.kubernetes.gpu_yielding import GpuYielding
from restore_agent.kubernetes.idle_pods import IdlePods
from restore_agent.kubernetes.injection import injected
from restore_agent.kubernetes.node_pods import NodePods
from restore_agent.kubernetes.pod_captures import PodCaptures
from restore_agent.kubernetes.pod_gpus import PodGpus
from restore_agent.kubernetes.pod_replicas import PodReplicas
from restore_agent.kubernetes.pod_resources import PodResources
from restore_agent.kubernetes.pods import Pods
from restore_agent.kubernetes.resource_slices import ResourceSlices
from restore_agent.places.placeholder import listening
from restore_agent.programs.main import CannotRun
from restore_agent.sequences.node import Node
from zerowake_shared.kubernetes.errors import ClusterError

_LOG = logging.getLogger("zerowake.agent")


@dataclass(frozen=True)
class Kubernetes:
    """This node is one of a cluster: its pods are restored into."""

    cri: Path | None  # the container runtime's socket; None: where it usually is
    nri: Path  # and the one for its plugins
    placeholder: Path  # folder of the node that is mounted into containers
    kubelet: Path  # the kubelet's folder
    plain_stores: bool  # are begun where the node has no key to encrypt by


async def serve_pods(kubernetes: Kubernetes, node: Node) -> None:
    """For ever. Raises CannotRun, CriError, NriError, OSError."""
    node.travel.begins_plain = kubernetes.plain_stores
    packages = await asyncio.to_thread(engine_packages.lay_out, node.store.state)
    gpumem = node.weights.socket
    try:
        async with (
            pods_served(node, kubernetes.placeholder, kubernetes.cri, kubernetes.kubelet) as (node_pods, gpus),
            nri.plugged(kubernetes.nri, injected(kubernetes.placeholder, packages, gpumem)),
            GpuYielding.watching(node_pods, gpus, gpumem, node.store.state, node.rungs.others_have),
        ):
            _LOG.info("pods of node %s are restored into", node.name)
            await asyncio.Event().wait()
    except ClusterError as error:
        raise CannotRun(str(error)) from error


@contextlib.asynccontextmanager
async def pods_served(node: Node, placeholder: Path, cri: Path | None, kubelet: Path) -> AsyncIterator[tuple[NodePods, PodGpus]]:
    """Placeholders are answered, and engines that run already adopted. Raises ClusterError, CriError, OSError."""
    async with (
        NodePods.followed(node.name) as node_pods,
        Cri.connected(cri) as runtime,
        PodResources.connected(kubelet) as resources,
    ):
        gpus = PodGpus(resources, ResourceSlices(node_pods.cluster, node.name), node.known_gpus)
        replicas = PodReplicas(node, node_pods)
        captures = PodCaptures(node, node_pods, gpus)
        adoption = Adoption(node.store, node_pods, runtime, gpus, replicas, captures)
        pods = Pods(node, node_pods, runtime, gpus, replicas, captures, adoption)
        await asyncio.to_thread(node.idling.notes.prune)
        async with (
            IdlePods(node_pods).followed(node.idling),
            listening(placeholder, pods.called),
            replicas.followed(),
            adoption.following(),
        ):
            yield node_pods, gpus
