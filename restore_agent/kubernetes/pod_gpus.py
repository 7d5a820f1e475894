"""Which GPUs of its node a pod got, known by their UUIDs: those of its engine, in CUDA's order, and those of all pods together.

    the kubelet (pod_resources.py)       what it has given to which container: by a device plugin's names, or by claims (DRA)
    ResourceSlices (resource_slices.py)  whose driver says which GPU a claim's device is; else the device's CDI names say it
    the container                        its device files, /dev/nvidiaN: what the runtime has really put there, and all that CUDA can find

A restore needs the last: CUDA opens the device file of the GPU that it wakes on. Its order is that of the node's GPUs, as CUDA counts
them: of GPUs of one model that is the order of the PCI bus, in every container. So the two must agree, or the engine starts cold with an
event: a container that sees another's GPU would be suspended and woken with that. Where the kubelet gave no GPU, or cannot be asked, what
is in the container counts alone; that is as sound, since no command of its owner has run in it yet. Rejected: NVIDIA_VISIBLE_DEVICES,
which an image or a pod may set to whatever it likes.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Mapping, Sequence

from restore_agent.drivers.cuda import NodeGpu
from restore_agent.kubernetes.calling_pod import CallingPod, Refused
from restore_agent.kubernetes.device_names import gpu_called, is_slice, shared_by
from restore_agent.kubernetes.pod import PodContainer
from restore_agent.kubernetes.pod_resources import Device, Holder, KubeletError, PodResources
from restore_agent.kubernetes.resource_slices import ResourceSlices
from restore_agent.places.container_error import ContainerError

_MPS = "CUDA_MPS_PIPE_DIRECTORY"
_LOG = logging.getLogger("zerowake.agent")


class UnsuitableGpus(Refused):
    """What a pod was given can be neither suspended nor restored on."""

    reason = "unsuitable-gpus"


class PodGpus:
    """Of one node. `gpus`: all that it has, in CUDA's order."""

    def __init__(self, resources: PodResources, slices: ResourceSlices, gpus: Sequence[NodeGpu]) -> None:
        self._resources = resources
        self._slices = slices
        self._gpus = gpus

    async def of(self, caller: CallingPod) -> tuple[str, ...]:
        """UUIDs of the GPUs of a container, in CUDA's order; none: it has none.

        Raises:
            UnsuitableGpus: it was given what CUDA's checkpoint cannot handle, or sees other GPUs than it was given.
            ContainerError: it has ended.
        """
        seen = {gpu.uuid for gpu in self._gpus if gpu.minor in _device_files(caller.placeholder.pid)}
        given, unknown = await self._given(caller)
        if (seen or given) and (pipes := caller.container.environment().get(_MPS)):
            raise UnsuitableGpus(
                f"its container shares a GPU by MPS ({_MPS}={pipes}), which CUDA's checkpoint does not support; share it in time, or give "
                "the pod a GPU of its own"
            )
        if missing := given - seen:
            raise UnsuitableGpus(
                f"the kubelet gave it {self._listed(missing)}, whose device file is not in its container: is the node's container runtime "
                "set up for GPUs (the pod's runtime class, or CDI)?"
            )
        if given and not unknown and (more := seen - given):
            raise UnsuitableGpus(
                f"its container sees {self._listed(more)} beside what the kubelet gave it; set NVIDIA_VISIBLE_DEVICES=void in its "
                "template, or take that variable out of its image"
            )
        return tuple(gpu.uuid for gpu in self._gpus if gpu.uuid in seen)

    async def held(self) -> Mapping[tuple[str, str], set[str]]:
        """Pod (namespace, name) → UUIDs of the GPUs that it was given; of what is no GPU here, its own name. Raises KubeletError."""
        given = await self._resources.given()
        uuids = await self._slices.uuids(device for devices in given.values() for device in devices)
        found: dict[tuple[str, str], set[str]] = {}
        for holder, devices in given.items():
            names = {self._called(device, uuids) or shared_by(uuids.get(device, device.name)) for device in devices}
            found.setdefault((holder.namespace, holder.pod), set()).update(names)
        return found

    async def _given(self, caller: CallingPod) -> tuple[set[str], bool]:
        """What the kubelet says: GPUs of this node; and whether there is more, of which nobody says what it is. Raises UnsuitableGpus."""
        pod, container = caller.pod, caller.about.name
        own = next((each for each in pod.spec.containers if each.name == container), None)
        if own is None or not wants_devices(own):
            return set(), False
        try:
            devices = (await self._resources.given()).get(Holder(pod.metadata.namespace, pod.metadata.name, container), [])
        except KubeletError as error:
            _LOG.warning("which GPUs pod %s was given is taken from its container's device files: %s", pod, error)
            return set(), True
        uuids = await self._slices.uuids(devices)
        if sliced := next((device for device in devices if any(map(is_slice, _names(device, uuids)))), None):
            raise UnsuitableGpus(
                f"the kubelet gave it a slice of a GPU (MIG: {uuids.get(sliced, sliced.name)}), which CUDA's checkpoint does not support; "
                "have it ask for whole GPUs"
            )
        found = {device: self._called(device, uuids) for device in devices}
        return {uuid for uuid in found.values() if uuid}, not all(found.values())

    def _called(self, device: Device, uuids: Mapping[Device, str]) -> str:
        return next((uuid for name in _names(device, uuids) if (uuid := gpu_called(name, self._gpus))), "")

    def _listed(self, uuids: Iterable[str]) -> str:
        return ", ".join(f"{gpu.uuid} (/dev/nvidia{gpu.minor})" for gpu in self._gpus if gpu.uuid in set(uuids))


def wants_devices(container: PodContainer) -> bool:
    """Extended resources have a domain in their name; what a claim is of is known to its driver alone."""
    return bool(container.resources.claims) or any("/" in name for name in container.resources.limits)


def _names(device: Device, uuids: Mapping[Device, str]) -> list[str]:
    """The surest first. What a driver of claims calls a device says nothing by itself."""
    return [uuids[device]] if device in uuids else [*device.cdi] if device.pool else [device.name]


def _device_files(pid: int) -> set[int]:
    """Minor numbers of the GPUs whose files are in this process's /dev. No link of the container is followed. Raises ContainerError."""
    try:
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            folder = os.open("dev", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
        finally:
            os.close(root)
        try:
            return {
                int(name.removeprefix("nvidia"))
                for name in os.listdir(folder)  # noqa: PTH208  (a path would be looked up anew)
                if name.startswith("nvidia") and name[6:].isdecimal() and stat.S_ISCHR(_mode(name, folder))
            }
        finally:
            os.close(folder)
    except OSError as error:
        raise ContainerError(f"/dev of the container cannot be read: {error.strerror}") from None


def _mode(name: str, folder: int) -> int:
    return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
