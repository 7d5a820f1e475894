"""Pods that surely are restored: what has to be so before one is made, and how one that is there began.

With several nodes a pod may land where no snapshot is, and where an agent or the webhook is away for a moment it starts as it always did.
So a test of restored pods cannot take the one that an earlier test has left: it has that one `emptied`, waits until a pod `restores`, and
looks whether its own `was_restored`.
"""

from __future__ import annotations

import asyncio

from tests.e2e.api import ApiError, Object, condition, path
from tests.e2e.release import Release, is_ready

WITHIN = 120.0
_LISTED_SECONDS = 0.2  # events are many and logs tell nobody that they grew: both are looked at again and again


async def scaled(made: Release, replicas: int, *models: str) -> None:
    for model in models:
        await made.api.merge("Deployment", made.namespace, model, {"spec": {"replicas": replicas}})


async def emptied(made: Release, *models: str) -> None:
    """No pod of these models is left, and none is wanted. Those of earlier tests are not waited for: one that was started cold may ignore
    SIGTERM for all of its grace period, which a kubelet that waits already does not shorten."""
    await scaled(made, 0, *models)
    for model in models:
        # Pods that are deleted before their controller has heard of it are made anew.
        await made.api.until("Deployment", made.namespace, model, _wants_none, WITHIN)
        for pod in await made.api.list("Pod", made.namespace, f"app={model}"):
            await made.api.delete("Pod", made.namespace, pod["metadata"]["name"], grace_seconds=0)
            await made.api.until("Pod", made.namespace, pod["metadata"]["name"], lambda one: one is None, WITHIN)


def _wants_none(deployment: Object | None) -> bool:
    heard = deployment and deployment["status"].get("observedGeneration") == deployment["metadata"]["generation"]
    return bool(heard) and not (deployment or {})["status"].get("replicas")


async def pods_of(made: Release, model: str) -> list[Object]:
    """Those that are not being deleted."""
    return [one for one in await made.api.list("Pod", made.namespace, f"app={model}") if not one["metadata"].get("deletionTimestamp")]


async def pod_of(made: Release, model: str) -> Object:
    """The only one, as it is now. Raises: ValueError."""
    (pod,) = await pods_of(made, model)
    return pod


async def ready_pod(made: Release, model: str, node: str = "") -> Object:
    """The only one of the model, once it is; and on that node, if one is named: of a node that is gone Kubernetes takes the pods for ready
    for a moment still."""
    async with asyncio.timeout(WITHIN):
        while True:
            found = await pods_of(made, model)
            if len(found) == 1 and condition(found[0], "Ready") and node in ("", found[0]["spec"]["nodeName"]):
                return found[0]
            await asyncio.sleep(_LISTED_SECONDS)  # which of several stays is nobody's event


async def how_it_began(made: Release, pod: Object, within: float = WITHIN) -> str:
    """Restored or ColdStarted, and why, by the agent's events."""
    async with asyncio.timeout(within):
        while True:
            every = await made.api.list("Event", made.namespace)
            found = {one["reason"]: one["message"] for one in every if one["involvedObject"].get("uid") == pod["metadata"]["uid"]}
            if reason := next((each for each in ("ColdStarted", "Restored") if each in found), ""):
                return f"{reason}: {found[reason]}"
            await asyncio.sleep(_LISTED_SECONDS)


async def beginning(made: Release, pod: Object, within: float = WITHIN) -> str:
    """Restored or ColdStarted, without why."""
    return (await how_it_began(made, pod, within)).partition(":")[0]


async def was_restored(made: Release, pod: Object) -> Object:
    """The pod itself. Raises: AssertionError that says how it began instead."""
    name, node = pod["metadata"]["name"], pod["spec"]["nodeName"]
    try:
        began = await how_it_began(made, pod)
    except TimeoutError:
        began = f"nobody says how; annotations {pod['metadata'].get('annotations')}"
    assert began.startswith("Restored"), (
        f"pod {name} on {node}, where {await made.holders(pod['metadata']['labels']['app'])} have it: {began}"
    )
    return pod


async def restores(made: Release, *models: str) -> None:
    """Until a pod of these models that is made now is restored."""
    for model in models:
        await made.api.until("ModelSnapshot", made.namespace, model, is_ready, WITHIN)
    await agents_serve(made)
    for model in models:
        await webhook_leads(made, model)


async def agents_serve(made: Release) -> None:
    """Until each node's agent is there, and its container runtime's plugin: what is made sooner is made without it."""
    for node in await made.api.list("Node"):
        if not condition(node, "Ready"):
            continue
        async with asyncio.timeout(WITHIN):
            while not (agents := await made.agents(node["metadata"]["name"])) or not await _is_plugged(made, agents[0]):
                await asyncio.sleep(_LISTED_SECONDS)


async def _is_plugged(made: Release, agent: Object) -> bool:
    if not condition(agent, "Ready"):
        return False
    try:
        log = await made.api.log_of(made.namespace, agent["metadata"]["name"], "agent")
    except ApiError:
        return False  # it ends, or its kubelet does not answer
    plugged = max(log.rfind("are restored into"), log.rfind("connected to the container runtime again"))
    return plugged > log.rfind("containers are made without the agent")


async def webhook_leads(made: Release, model: str) -> None:
    """Until a pod that is made now is marked, and led to nodes that have the snapshot alone."""
    deployment = await made.api.get("Deployment", made.namespace, model)
    pod = {"apiVersion": "v1", "kind": "Pod", **deployment["spec"]["template"]}
    pod["metadata"] = {**pod["metadata"], "name": f"{model}-would-be"}
    async with asyncio.timeout(WITHIN):
        while True:
            would_be = await made.api.ask("POST", path("Pod", made.namespace), {"dryRun": "All"}, pod)
            marked = "zerowake.dev/digest" in would_be["metadata"].get("annotations", {})
            if marked and (led := _preferred(would_be)) and led <= set(await made.holders(model)):
                return
            await asyncio.sleep(_LISTED_SECONDS)


def _preferred(pod: Object) -> set[str]:
    """The nodes that it is sent to if they have room."""
    if "affinity" not in pod["spec"]:
        return set()  # the webhook that was asked has heard of no agent yet
    terms = pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    chosen = [field for term in terms for field in term["preference"].get("matchFields", []) if field["operator"] == "In"]
    return {name for field in chosen for name in field["values"]}
