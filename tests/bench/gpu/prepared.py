"""What pods.py needs and no cluster has to be there for: the machine's GPUs, the example's objects, the model's files, an image."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from gpumem.checkpoint.safetensors import keep_reading, read_checkpoint
from tests.e2e.api import Object
from tests.e2e.cluster.gpus import Gpus
from tests.e2e.cluster.machine_image import Installed, write_machine_image
from tests.worlds import lending_chat_engine
from tests.worlds.model_files import write_model
from tests.worlds.model_shapes import Shape

EXAMPLE = Path(__file__).parents[3] / "deploy/examples/gpu-engine.yaml"
STAND_IN = Path(lending_chat_engine.__file__)
# Of vLLM on a machine that has no network; what people set in their images' environment.
OFFLINE = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
MODELS, COLD = "models", "cold"  # the namespace, and the claim in it; the Deployment that is not restored
IMPORTS = ("torch",)  # what brings most of the libraries that vLLM maps
NAME_OPTION = "--served-model-name="
COLD_GRACE_SECONDS = 10  # of pods that nobody but this benchmark asks
COOLDOWN = {"cooldownPeriod": 3, "pollingInterval": 1}
console = Console(width=220)


@dataclass
class Machine:
    """Whose Python, packages and GPUs these are. `gpus` is None for the stand-in."""

    root: Path
    python: str
    packages: Path | None
    gpus: Gpus | None

    def used(self) -> int:
        """Bytes in use on all GPUs."""
        return self.gpus.used_bytes(self.root) if self.gpus else 0

    def named(self) -> dict[str, Any]:
        if not self.gpus:
            return {"gpus": ["stand-in"], "driver": "none"}
        ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        inside = [] if self.root == Path("/") else ["chroot", str(self.root)]
        lines = subprocess.run([*inside, *ask], capture_output=True, text=True, check=True).stdout.splitlines()
        return {"gpus": [line.split(",")[0] for line in lines], "driver": lines[0].split(",")[1].strip()}


@dataclass(frozen=True)
class Prepared:
    """What can be made without a cluster."""

    models: Path  # the volume
    weights: int  # bytes
    image: Path  # archive

    @classmethod
    def within(cls, work: Path, machine: Machine, shape: Shape | None) -> Prepared:
        """What stands in the folder already stays as it is."""
        container = container_of(example(shape is None)[0])
        began = time.monotonic()
        models = work / (shape.name if shape else "stand-in")
        folder = models / Path(container["args"][0]).name
        if not folder.exists():
            lay_out_model(shape, folder)
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        console.print(f"{weights / 1e9:.2f} GB of weights stand after {time.monotonic() - began:.1f} s")
        archive = work / ("vllm.tar" if shape else "stand-in.tar")
        if not archive.exists():
            make_image(machine, work, container["image"], archive)
        console.print(f"an image of {archive.stat().st_size / 1e9:.2f} GB stands after {time.monotonic() - began:.1f} s")
        return cls(models, weights, archive)


def example(stand_in: bool) -> tuple[Object, Object, Object]:
    """The Deployment, ModelSnapshot and ScaledObject of the example, as they stand there.

    For the stand-in without what its pod asks of a machine, since it runs on small ones.
    """
    deployment, snapshot, scaled = yaml.safe_load_all(EXAMPLE.read_text())
    if stand_in:
        for one in (deployment, snapshot):
            del container_of(one)["resources"]["requests"]
    return deployment, snapshot, scaled


def container_of(one: Object) -> Object:
    (container,) = one["spec"]["template"]["spec"]["containers"]
    found: Object = container
    return found


def without_zerowake(deployment: Object) -> Object:
    """A Deployment of the same pods, which are never restored; the gateway holds requests for it all the same."""
    cold: Object = json.loads(json.dumps(deployment))
    cold["metadata"]["name"] = COLD
    template = cold["spec"]["template"]["metadata"]
    template["labels"]["app"] = cold["spec"]["selector"]["matchLabels"]["app"] = COLD
    template["annotations"] = {"zerowake.dev/restore": "false", "zerowake.dev/model": COLD}
    cold["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = COLD_GRACE_SECONDS
    # The gateway goes by the name in a request, and the engine has to know itself by that.
    container_of(cold)["args"] = [f"{NAME_OPTION}{COLD}" if word.startswith(NAME_OPTION) else word for word in container_of(cold)["args"]]
    # Until it is ready it gets no request; the example's pods have no probe, since the agent says when an engine is.
    container_of(cold)["readinessProbe"] = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 1}
    return cold


def without_volumes(deployment: Object) -> Object:
    """Its pods have none: the kubelet looks for a pod's at once, and then each 0.3 s. A restored engine reads nothing of its model's."""
    bare: Object = json.loads(json.dumps(deployment))
    pod = bare["spec"]["template"]["spec"]
    del pod["volumes"], container_of(bare)["volumeMounts"]
    pod["automountServiceAccountToken"] = False
    return bare


def scaled_as(scaled: Object, name: str) -> Object:
    found: Object = json.loads(json.dumps(scaled))
    found["metadata"]["name"] = found["spec"]["scaleTargetRef"]["name"] = name
    found["spec"]["triggers"][0]["metadata"]["model"] = name
    found["spec"] |= COOLDOWN
    return found


def volume(folder: Path) -> list[Object]:
    """The claim `models` of the example, and the folder that it is bound to."""
    size = {"storage": "1Ti"}
    common = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    bound = {"capacity": size, "hostPath": {"path": str(folder)}, "persistentVolumeReclaimPolicy": "Retain", **common}
    claim = {"resources": {"requests": size}, "volumeName": MODELS, **common}
    return [
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": MODELS}, "spec": bound},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": MODELS}, "spec": claim},
    ]


def served_name(container: Object) -> str:
    """The engine's own name of its model."""
    (found,) = [word.removeprefix(NAME_OPTION) for word in container["args"] if word.startswith(NAME_OPTION)]
    return str(found)


def make_image(machine: Machine, work: Path, name: str, archive: Path) -> None:
    """Of the machine's vLLM; or of its Python with the stand-in."""
    if "." not in name.partition("/")[0]:
        name = f"docker.io/{name}"  # where a name without a registry is looked for
    if machine.gpus:
        # As pip writes it: the engine's processes are spawned, and import this file.
        starts = "import sys\nfrom vllm.entrypoints.cli.main import main\nif __name__ == '__main__':\n    sys.exit(main())"
        libraries = os.environ.get("LD_LIBRARY_PATH", "")
        env = OFFLINE | ({"LD_LIBRARY_PATH": libraries} if libraries else {})
        made = Installed(machine.python, "vllm", starts, ("serve",), machine.packages, IMPORTS, env, machine.root)
        write_machine_image(made, name, archive, (*machine.gpus.libraries, *machine.gpus.programs))
    else:
        packages = work / "packages"
        packages.mkdir(exist_ok=True)
        shutil.copy(STAND_IN, packages)
        starts = f"from {STAND_IN.stem} import main\nmain()"
        write_machine_image(Installed(machine.python, "engine", starts, packages=packages, machine=machine.root), name, archive)


def lay_out_model(shape: Shape | None, folder: Path) -> None:
    """The model as its owner has it on a volume; without a shape the stand-in's."""
    if shape:
        write_model(folder, shape)
    else:
        lending_chat_engine.write_model(folder)
        keep_reading(folder, read_checkpoint(folder))
