"""Which GPU a pod gets, by a device plugin and by a claim (DRA), from a real kubelet: an engine that was captured on one GPU is restored
onto the one that its pod was given. The GPUs and their driver stand in for real ones (tests/worlds/stand_in_driver.py)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.api import Api, Object, condition
from tests.e2e.cluster.control import enter
from tests.e2e.cluster.layout import NODE
from tests.e2e.node_agent import IMAGE, PORT, Agent, answer, captured_or_not, events, node_agent, pod, run_in, wanted_bytes

pytestmark = pytest.mark.own_cluster("runs an agent and GPUs of its own on the node")
ENGINE = ["python3", "-u", "-c", (Path(__file__).parents[1] / "worlds/stand_in_engine.py").read_text(), str(PORT)]
GPUS = [
    {"uuid": f"GPU-{number:08x}-0000-0000-0000-000000000000", "name": model, "minor": number}
    for number, model in enumerate(("Stand-in", "Stand-in", "Another"))
]
ONE, TWO, OTHER = (str(gpu["uuid"]) for gpu in GPUS)
FILES = {str(gpu["uuid"]): f"/dev/nvidia{gpu['minor']}" for gpu in GPUS}


@pytest.fixture(scope="module")
def agent(kubeconfig: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    program = f"-m tests.worlds.stand_in_driver {shlex.quote(json.dumps(GPUS))}"
    with node_agent(tmp_path_factory.mktemp("agent"), program) as agent:
        folder = agent.placeholder.parent
        files = " && ".join(f"mknod {file_of(agent, uuid)} c 1 3" for uuid in FILES)
        subprocess.run([*enter(), "sh", "-c", f"mkdir -p {folder}/gpus && {files}"], check=True)
        yield agent


def file_of(agent: Agent, uuid: str) -> Path:
    """Of the node, which has no such GPU in its own /dev."""
    return agent.placeholder.parent / "gpus" / Path(FILES[uuid]).name


@pytest.fixture(scope="module")
def plugins(agent: Agent) -> Iterator[tuple[str, str]]:
    """Two device plugins' resources: the two GPUs of one model, and the one of another."""
    kind = f"zerowake.test/{secrets.token_hex(3)}"
    with contextlib.ExitStack() as stack:
        for resource, uuids in ((f"{kind}-gpu", (ONE, TWO)), (f"{kind}-other", (OTHER,))):
            devices = [f"{uuid}={file_of(agent, uuid)}" for uuid in uuids]
            stack.enter_context(registered("device_plugin.py", "/var/lib/kubelet/device-plugins", resource, *devices))
        yield f"{kind}-gpu", f"{kind}-other"


@pytest.fixture(scope="module")
def driver(agent: Agent) -> Iterator[str]:
    """A driver of claims, and its DeviceClass. It is needed until the last pod with a claim of it has gone."""
    name = f"gpu-{secrets.token_hex(3)}.zerowake.test"
    devices = [f"gpu-{uuid[4:12]}={uuid}={file_of(agent, uuid)}" for uuid in (ONE, TWO)]
    with registered("dra_driver.py", NODE, name, *devices, "memory=host"):
        yield name
    subprocess.run([*enter(), "kubectl", "delete", f"deviceclass/{name}", f"resourceslice/{name}"], check=True, capture_output=True)


@contextlib.contextmanager
def registered(program: str, *words: str) -> Iterator[None]:
    """Runs it on the node once it says that the kubelet knows it."""
    command = [*enter(), sys.executable, str(Path(__file__).parent / program), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "registered\n"
            yield
        finally:
            process.kill()


def engine(agent: Agent, name: str, *, captured: bool = False, **spec: Any) -> Object:
    labels = {f"zerowake.dev/{'capture' if captured else 'snapshot'}": "small"}
    container = {"env": [], **spec.pop("container")}
    return pod(agent, name, labels, ENGINE, container=container, **spec)


def limited(resource: str) -> dict[str, Any]:
    return {"container": {"resources": {"limits": {resource: 1}}}}


def claiming(claim: str) -> dict[str, Any]:
    claims = [{"name": "gpu", "resourceClaimName": claim}]
    return {"container": {"resources": {"claims": [{"name": "gpu"}]}}, "resourceClaims": claims}


async def captured(api: Api, agent: Agent, namespace: str, **spec: Any) -> None:
    await api.apply(engine(agent, "capture-small", captured=True, **spec), namespace=namespace)
    annotations = await captured_or_not(api, namespace, "small")
    assert annotations.get("zerowake.dev/captured"), annotations


async def holds(api: Api, namespace: str, name: str) -> list[str]:
    """The device files that the engine of a pod has open."""
    ready = await api.until("Pod", namespace, name, lambda one: condition(one, "Ready"))
    assert ready
    found: list[str] = (await answer(ready["status"]["podIP"], "/gpu"))["holds"]
    return found


async def test_a_pod_is_restored_onto_the_gpu_that_a_device_plugin_gave(
    api: Api, plugins: tuple[str, str], namespace: str, running: Agent
) -> None:
    """Two pods at once get both GPUs, so one of them another than the one that was captured on."""
    resource, other = plugins
    for each, count in ((resource, "2"), (other, "1")):
        await api.until("Node", "", NODE, lambda one, each=each, count=count: one and one["status"]["allocatable"].get(each) == count)
    await captured(api, running, namespace, **limited(resource))
    for name, of in (("one", resource), ("two", resource), ("stranger", other)):
        await api.apply(engine(running, name, **limited(of)), namespace=namespace)
    given = {}
    for name in ("one", "two"):
        said = dict(await events(api, namespace, name, "Restored"))["Restored"]
        shown = await run_in(namespace, name, "tr '\\0' '\\n' </proc/1/environ")
        given[name] = shown.partition("NVIDIA_VISIBLE_DEVICES=")[2].partition("\n")[0]
        assert f" on {given[name]} (" in said
        assert await holds(api, namespace, name) == [FILES[given[name]]], (name, given)
    assert set(given.values()) == {ONE, TWO}
    said = dict(await events(api, namespace, "stranger", "RestoreFailed", "ColdStarted"))["RestoreFailed"]
    assert "it was taken on 1 × Stand-in, and this pod was given 1 × Another; ask for the same GPUs" in said
    assert await holds(api, namespace, "stranger") == [FILES[OTHER]], "and it serves all the same"


async def test_a_pod_is_restored_onto_the_gpu_of_its_claim(api: Api, driver: str, namespace: str, running: Agent) -> None:
    for name, uuid in (("first", ONE), ("second", TWO), ("memory", "host")):
        selector = {"cel": {"expression": f'device.attributes["{driver}"].uuid == "{uuid}"'}}
        exactly = {"deviceClassName": driver, "selectors": [selector]}
        spec = {"devices": {"requests": [{"name": "gpu", "exactly": exactly}]}}
        claim = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim", "metadata": {"name": name}, "spec": spec}
        await api.apply(claim, namespace=namespace)
    await captured(api, running, namespace, **claiming("first"))
    await api.apply(engine(running, "one", **claiming("second")), namespace=namespace)
    assert f" on {TWO} (" in dict(await events(api, namespace, "one", "Restored"))["Restored"]
    assert await holds(api, namespace, "one") == [FILES[TWO]]

    # gpumem on the host's memory, which a pod claims that is none of ours.
    gpumem = [sys.executable, "-c", "from gpumem.programs.commands import app; app()"]
    serving = [*gpumem, "serve", "--reserve", "256M", "--device", "host", "--socket", str(running.folder / "gpumem.sock")]
    with subprocess.Popen(serving) as process:
        try:
            assert await wanted_bytes(gpumem, running) == 256 << 20
            job = {"name": "job", "image": IMAGE, "imagePullPolicy": "Never", "command": ["sleep", "1000"]}
            spec = {**claiming("memory"), "terminationGracePeriodSeconds": 0}
            made = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "foreign"}}
            await api.apply({**made, "spec": {"containers": [job | spec.pop("container")], **spec}}, namespace=namespace)
            async with asyncio.timeout(30):
                while await wanted_bytes(gpumem, running):
                    await asyncio.sleep(0.05)  # gpumem tells nobody by itself
            await api.delete("Pod", namespace, "foreign", grace_seconds=0)
            async with asyncio.timeout(30):
                while await wanted_bytes(gpumem, running) != 256 << 20:
                    await asyncio.sleep(0.05)
        finally:
            process.terminate()
