"""The cluster's API for tests: objects as they are written in YAML, and waiting that follows a watch.

The transport, its certificates and tokens are the official client's; its generated models would hide what a test wants to see.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from kubernetes.aio import client, config

Object = dict[str, Any]
PLURALS = {
    "APIService": "apiregistration.k8s.io/v1 apiservices",
    "ClusterRole": "rbac.authorization.k8s.io/v1 clusterroles",
    "ClusterRoleBinding": "rbac.authorization.k8s.io/v1 clusterrolebindings",
    "ConfigMap": "v1 configmaps",
    "CustomResourceDefinition": "apiextensions.k8s.io/v1 customresourcedefinitions",
    "DaemonSet": "apps/v1 daemonsets",
    "Deployment": "apps/v1 deployments",
    "EndpointSlice": "discovery.k8s.io/v1 endpointslices",
    "Event": "v1 events",
    "HorizontalPodAutoscaler": "autoscaling/v2 horizontalpodautoscalers",
    "Lease": "coordination.k8s.io/v1 leases",
    "ModelSnapshot": "zerowake.dev/v1alpha1 modelsnapshots",
    "MutatingWebhookConfiguration": "admissionregistration.k8s.io/v1 mutatingwebhookconfigurations",
    "Namespace": "v1 namespaces",
    "Node": "v1 nodes",
    "Pod": "v1 pods",
    "ReplicaSet": "apps/v1 replicasets",
    "DeviceClass": "resource.k8s.io/v1 deviceclasses",
    "ResourceClaim": "resource.k8s.io/v1 resourceclaims",
    "ResourceSlice": "resource.k8s.io/v1 resourceslices",
    "ScaledObject": "keda.sh/v1alpha1 scaledobjects",
    "Secret": "v1 secrets",
    "Service": "v1 services",
    "ServiceAccount": "v1 serviceaccounts",
    "TriggerAuthentication": "keda.sh/v1alpha1 triggerauthentications",
}
MANAGER = "zerowake-tests"
PATIENCE_SECONDS = 60.0

_TOO_SOON, _TOO_SOON_TRIES = 429, 10


class ApiError(Exception):
    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(f"{message} (HTTP {status})")


class Api:
    def __init__(self, transport: client.ApiClient) -> None:
        self._transport: Any = transport  # it has no types

    @classmethod
    @asynccontextmanager
    async def connect(cls, kubeconfig: str) -> AsyncIterator[Api]:
        configuration = client.Configuration()
        await config.load_kube_config(kubeconfig, client_configuration=configuration)  # type: ignore[no-untyped-call]
        async with client.ApiClient(configuration) as transport:
            yield cls(transport)

    async def apply(self, *objects: Object, namespace: str = "", dry_run: bool = False) -> list[Object]:
        """Server-side: made, or brought to this. `namespace`: of those that name none. A kind outside PLURALS is refused."""
        query = {"fieldManager": MANAGER, "force": "true"} | ({"dryRun": "All"} if dry_run else {})
        done = []
        for one in objects:
            metadata = one["metadata"]
            where = path(one["kind"], metadata.get("namespace", namespace), metadata["name"])
            done.append(await self.ask("PATCH", where, query, one, "application/apply-patch+yaml"))
        return done

    async def get(self, kind: str, namespace: str, name: str) -> Object:
        return await self.ask("GET", path(kind, namespace, name))

    async def list(self, kind: str, namespace: str = "", labels: str = "") -> list[Object]:
        items: list[Object] = (await self.ask("GET", path(kind, namespace), {"labelSelector": labels}))["items"]
        return items

    async def merge(self, kind: str, namespace: str, name: str, change: Object, subresource: str = "") -> Object:
        return await self.ask("PATCH", path(kind, namespace, name, subresource), None, change, "application/merge-patch+json")

    async def delete(self, kind: str, namespace: str, name: str, grace_seconds: int | None = None) -> None:
        """Asks for it; one that is not there is fine."""
        options: Object = {"propagationPolicy": "Background"}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            await self.ask("DELETE", path(kind, namespace, name), None, options)
        except ApiError as error:
            if error.status != 404:
                raise

    async def log_of(self, namespace: str, pod: str, container: str = "", timestamps: bool = False) -> str:
        query = {"container": container, "timestamps": "true" if timestamps else ""}
        async with self._open("GET", path("Pod", namespace, pod, "log"), query) as response:
            return await response.text()

    async def watch(
        self, kind: str, namespace: str = "", labels: str = "", listed: Object | None = None
    ) -> AsyncIterator[tuple[str, Object]]:
        """Every object that is there, as ADDED, then every change. A stream that the server ends is opened again where it was.

        listed: the list that it begins from, where the caller has looked at one: what vanishes between two lists is in neither.
        """
        where = path(kind, namespace)
        listed = listed or await self.ask("GET", where, {"labelSelector": labels})
        for one in listed["items"]:
            yield "ADDED", one
        version = listed["metadata"]["resourceVersion"]
        while True:
            query = {"labelSelector": labels, "watch": "true", "resourceVersion": version}
            async with self._open("GET", where, query) as response:
                while line := await response.content.readline():
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise ApiError(event["object"].get("code", 0), event["object"].get("message", "the watch failed"))
                    version = event["object"]["metadata"]["resourceVersion"]
                    yield event["type"], event["object"]

    async def until(
        self, kind: str, namespace: str, name: str, holds: Callable[[Object | None], object], within: float = PATIENCE_SECONDS
    ) -> Object | None:
        """Follows one object until `holds` is true of it (None: it is not there); returns it as it then was."""
        last: Object | None = None
        try:
            async with asyncio.timeout(within):
                listed = await self.ask("GET", path(kind, namespace))
                if not any(one["metadata"]["name"] == name for one in listed["items"]) and holds(None):
                    return None
                async for change, one in self.watch(kind, namespace, listed=listed):
                    if one["metadata"]["name"] == name:
                        last = None if change == "DELETED" else one
                        if holds(last):
                            return last
        except TimeoutError:
            raise AssertionError(f"{kind} {namespace}/{name} is not so after {within:g} s; it is {json.dumps(last, indent=1)}") from None
        raise AssertionError("unreachable: a watch has no end")

    async def ask(
        self,
        method: str,
        where: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = "application/json",
    ) -> Object:
        """Any path of the API, as `kubectl get --raw` takes it. Raises: ApiError."""
        async with self._open(method, where, query, body, content) as response:
            answer: Object = json.loads(await response.read())
            return answer

    @asynccontextmanager
    async def _open(
        self,
        method: str,
        where: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = "application/json",
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        given = [(key, value) for key, value in (query or {}).items() if value]
        headers = {"Accept": "application/json", "Content-Type": content}
        call = await self._transport.param_serialize(
            method, where, query_params=given, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        for again in reversed(range(_TOO_SOON_TRIES)):
            answer = await self._transport.call_api(*call, _request_timeout=aiohttp.ClientTimeout(sock_connect=10))
            response: aiohttp.ClientResponse = answer.response
            # The server says when: with a CustomResourceDefinition that has just been made, its storage may begin anew. An eviction
            # that a budget forbids is a 429, too, and does not say when.
            pause = response.headers.get("Retry-After", "")
            if response.status != _TOO_SOON or method != "GET" or not pause.isdigit() or not again:
                break
            response.close()
            await asyncio.sleep(int(pause))
        try:
            if response.status >= 400:
                text = await response.text()
                raise ApiError(response.status, f"{method} {where}: {_message(text)}")
            yield response
        finally:
            response.close()


def path(kind: str, namespace: str = "", name: str = "", subresource: str = "") -> str:
    api, plural = PLURALS[kind].split()
    root = f"/apis/{api}" if "/" in api else f"/api/{api}"
    return "/".join(part for part in (root, f"namespaces/{namespace}" if namespace else "", plural, name, subresource) if part)


def condition(one: Object | None, kind: str) -> bool:
    """Whether the object's condition of that type is true."""
    found = ((one or {}).get("status") or {}).get("conditions") or []
    return any(condition["type"] == kind and condition["status"] == "True" for condition in found)


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError):
        return text[:300]
