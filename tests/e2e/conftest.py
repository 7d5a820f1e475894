"""Tests on a real cluster: the one that KUBECONFIG names, else the one that `make cluster` started here.

On a foreign cluster only those run that a guest may run: what stops parts of the cluster, or has its servers on this machine, is marked
`own_cluster` and skipped there, with the reason. Each test has a namespace of its own; nothing runs in it when the test has ended, and it
is gone when all have. When a test fails, its report has the namespace's events and pods' logs, and what the cluster's own programs wrote
meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.api import Api, ApiError
from tests.e2e.chart import run
from tests.e2e.cluster.control import NOT_RUNNING, current, import_archives, running
from tests.e2e.cluster.images import build
from tests.e2e.cluster.layout import BIN, KUBECONFIG, LOGS, Addresses
from tests.e2e.node_agent import Agent, node_agent

LINES = 40
NAMESPACE = pytest.StashKey[str]()
BEGAN = pytest.StashKey[dict[Path, int]]()  # how long each program's log was when the test began
NOT_OURS = "this cluster was named by KUBECONFIG: the test needs one that `make cluster` started, since it "


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "own_cluster(why): needs the cluster of `make cluster`; why a foreign one won't do")


def foreign() -> bool:
    return Path(os.environ.get("KUBECONFIG") or KUBECONFIG) != KUBECONFIG


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("own_cluster")
        if marker and foreign():
            item.add_marker(pytest.mark.skip(reason=NOT_OURS + marker.args[0]))


@pytest.fixture(scope="session")
def kubeconfig() -> str:
    if foreign():
        return os.environ["KUBECONFIG"]
    if not running():
        pytest.fail(f"{NOT_RUNNING} Or let KUBECONFIG name another.", pytrace=False)
    return str(KUBECONFIG)


@pytest.fixture(scope="session")
def addresses(kubeconfig: str) -> Addresses:
    """For tests of the own cluster: where its nodes are, and where it reaches servers of this machine."""
    return current()


@pytest.fixture(scope="session")
def images(kubeconfig: str) -> None:
    """zerowake's own and the tests' engine are on every node, as the checkout has them. A foreign cluster is expected to have them."""
    if not foreign():
        import_archives(build())


@pytest.fixture(scope="module")
def agent(kubeconfig: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """One on the node, for all tests of a file: it does not run yet, and those that end it start it again."""
    with node_agent(tmp_path_factory.mktemp("agent")) as agent:
        yield agent


@pytest.fixture(name="running")
async def agent_that_runs(agent: Agent) -> AsyncIterator[Agent]:
    """For one test."""
    with agent.running():
        await agent.ready()
        yield agent


@pytest.fixture
def reported(request: pytest.FixtureRequest, installed: Any) -> None:
    """For tests that share their module's `installed`, a Release: a failing one's report has the logs of that namespace."""
    request.node.stash[NAMESPACE] = installed.namespace


@pytest.fixture
async def api(kubeconfig: str) -> AsyncIterator[Api]:
    async with Api.connect(kubeconfig) as api:
        yield api


@pytest.fixture(scope="session")
def leaving(kubeconfig: str) -> Iterator[list[str]]:
    """Namespaces that were told to go. That they do is awaited once: each takes five seconds, in which the cluster does nothing."""
    names: list[str] = []
    yield names
    if names:
        run(kubeconfig, "kubectl", "wait", "--for=delete", "--timeout=2m", *(f"namespace/{name}" for name in names))


@pytest.fixture
async def namespace(api: Api, request: pytest.FixtureRequest, leaving: list[str]) -> AsyncIterator[str]:
    """Of this test alone. That all in it ends is awaited: what is left running would take processor time from the next test."""
    stem = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:40].strip("-")
    name = f"{stem}-{secrets.token_hex(3)}"
    await api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    await api.until("ServiceAccount", name, "default", lambda one: one)
    request.node.stash[NAMESPACE] = name
    try:
        yield name
    finally:
        for kind in ("ScaledObject", "Deployment", "ReplicaSet", "Pod"):  # owners first: they would make others
            await remove(api, kind, name)
        await api.delete("Namespace", "", name)
        leaving.append(name)


async def remove(api: Api, kind: str, namespace: str) -> None:
    """All of them, at once."""
    try:
        found = [one["metadata"]["name"] for one in await api.list(kind, namespace)]
    except ApiError as error:
        if error.status != 404:  # a foreign cluster may be without KEDA
            raise
        return
    for name in found:
        await api.delete(kind, namespace, name, grace_seconds=0)
    for name in found:
        await api.until(kind, namespace, name, lambda one: one is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[BEGAN] = {log: log.stat().st_size for log in sorted(LOGS.glob("*.log"))}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if report.when in ("setup", "call") and report.failed:
        report.sections += [*_namespace(item.stash.get(NAMESPACE, None)), *_programs(item.stash.get(BEGAN, {}))]
    return report


def _namespace(name: str | None) -> Iterator[tuple[str, str]]:
    """Its events and logs, while it is still there."""
    if name is None:
        return
    kubectl = ["kubectl", f"--namespace={name}"]
    where = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "KUBECONFIG": os.environ["KUBECONFIG"] if foreign() else str(KUBECONFIG)}
    for title, command in {
        "objects": [*kubectl, "get", "all,scaledobjects", "--output=wide"],
        "events": [*kubectl, "get", "events", "--sort-by=.lastTimestamp"],
        "pods' logs": [*kubectl, "logs", "--all-containers", "--prefix", f"--tail={LINES}", "--selector", "!nothing"],
    }.items():
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, env=where)
        yield f"{title} in namespace {name}", done.stdout + done.stderr


def _programs(began: dict[Path, int]) -> Iterator[tuple[str, str]]:
    for log, size in began.items():
        with contextlib.suppress(OSError), log.open("rb") as file:
            file.seek(size)
            lines = file.read().decode(errors="replace").splitlines()
            if lines:
                yield f"{log.name}, the last of {len(lines)} lines since the test began", "\n".join(lines[-LINES:])
