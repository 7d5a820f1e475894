"""README's "On Kubernetes", every command of it as it stands there and in its order, and what it promises in between.

`docker build` alone is not run: buildah has built the same targets of the same file. There is no registry: images get their names on the
nodes. The release's name and kinds are the cluster's, so there is one install at a time.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.e2e.api import Api, condition
from tests.e2e.chart import CRD, ROOT, run
from tests.e2e.cluster.control import enter
from tests.e2e.cluster.images import IMAGES
from tests.e2e.cluster.layout import members
from tests.e2e.release import is_ready

pytestmark = [pytest.mark.own_cluster("installs the chart, from images of this checkout"), pytest.mark.usefixtures("images")]
QUESTION = {"model": "chat", "messages": [{"role": "user", "content": "one two three"}]}


def blocks() -> list[str]:
    section = (ROOT / "README.md").read_text().partition("\n## On Kubernetes\n")[2].partition("\n## ")[0]
    return re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = blocks()[0].replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
async def cluster(api: Api, kubeconfig: str) -> AsyncIterator[Api]:
    """Without zerowake, and without what the commands leave to their user."""
    named: list[str] = []
    for words in commands():
        if words[:2] == ["docker", "build"]:
            named.append(name_on_nodes(words))
    yield api
    await asyncio.to_thread(run, kubeconfig, "helm", "uninstall", "zerowake", "--namespace", "zerowake", "--ignore-not-found", "--wait")
    for namespace in ("models", "zerowake"):
        await api.delete("Namespace", "", namespace)
        await api.until("Namespace", "", namespace, lambda one: one is None, within=300)
    on_each_node("rm", *named)


def name_on_nodes(build: list[str]) -> str:
    """The image that this command would have built and pushed."""
    said = dict(zip(build[2:-1:2], build[3:-1:2], strict=True))
    (image,) = [each for each in IMAGES if each.dockerfile == ROOT / said["-f"] and each.target == said["--target"]]
    assert build[-1] == "." and image.context == ROOT
    on_each_node("tag", "--force", image.name, said["-t"])
    return said["-t"]


def on_each_node(*words: str) -> None:
    for member in members():
        images = [*enter(member.name), "ctr", "--namespace", "k8s.io", "images"]
        subprocess.run([*images, *words], check=True, capture_output=True)


async def test_every_command_of_the_readme(cluster: Api, kubeconfig: str) -> None:
    ran = []
    for words in commands():
        if words[0] == "docker":
            continue
        if words[:2] == ["helm", "uninstall"]:
            await answered(cluster)
        if words[-2:] == ["get", "modelsnapshots"]:
            await cluster.until("ModelSnapshot", "models", "chat", is_ready, 180)
            shown = await asyncio.to_thread(run, kubeconfig, *words)
            (head, row), (head_there, row_there) = (text.splitlines() for text in (shown, blocks()[1]))
            assert head.split() == head_there.split()
            assert row.split()[:3] == row_there.split()[:3]
        else:
            shown = await asyncio.to_thread(run, kubeconfig, *words)
        print(shown)
        ran.append(words[0])
    assert ran == ["helm", "kubectl", "kubectl", "kubectl", "helm"]
    await cluster.until("CustomResourceDefinition", "", CRD, lambda one: one is None)


async def answered(api: Api) -> None:
    """A request brings a pod, and the pod was restored."""
    await api.until("ScaledObject", "models", "chat", lambda one: condition(one, "Ready"))
    service = await api.get("Service", "zerowake", "zerowake")
    url = f"http://{service['spec']['clusterIP']}/v1/chat/completions"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=90)) as client, client.post(url, json=QUESTION) as response:
        assert response.status == 200, await response.text()
        assert (await response.json())["choices"][0]["message"]["content"] == "three two one"
    async with asyncio.timeout(20):
        while "Restored" not in (reasons := {each["reason"] for each in await api.list("Event", "models")}):
            assert "ColdStarted" not in reasons
            await asyncio.sleep(0.2)
