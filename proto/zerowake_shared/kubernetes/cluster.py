"""The only file of the project that talks to Kubernetes' API.

Connection, TLS, credentials and their renewal are the official client's. Its generated models are not used: a watch of pods would build
hundreds of objects of pure Python for each event (milliseconds), and our own kind has no model at all. Requests go through its `ApiClient`
and answers are decoded by msgspec into the few fields that a reader declares. Its `Watch` was rejected too: it opens a second client,
reconnects without a pause, and hides when a list must be made anew; informer.py lists and watches. Every write is a patch (or a create, or
a delete with the uid that was seen): two writers never undo each other's fields.
Its import takes longer than all our own, so whoever can do without Kubernetes imports this file only once it is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
from collections.abc import AsyncIterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar

import aiohttp
import msgspec
from kubernetes.aio import client, config

from zerowake_shared.clock import SYSTEM_CHANCE, SYSTEM_CLOCK, Clock, token
from zerowake_shared.kubernetes.errors import ClusterError, Conflict, Expired, NotFound
from zerowake_shared.kubernetes.informer import Informer, Page
from zerowake_shared.kubernetes.note import fitted
from zerowake_shared.kubernetes.resource import EVENTS, Identity, Resource, timestamp

log = logging.getLogger(__name__)

T = TypeVar("T")
_REQUEST_SECONDS = 30.0
_EVENT_REPEAT_SECONDS = 60.0  # the same event about the same object again within this time is left out
_EVENTS_KEPT = 1000
_GONE = 410
MERGE = "application/merge-patch+json"


class _ListMetadata(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class _List(msgspec.Struct):
    metadata: _ListMetadata
    items: list[msgspec.Raw] | None = None


class _Version(msgspec.Struct, rename="camel"):
    git_version: str


class _WatchEvent(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Failure(msgspec.Struct):
    message: str = ""
    code: int = 0


class Cluster:
    """The API of one cluster. Use `async with Cluster.connect(…) as cluster`."""

    def __init__(
        self, api: client.ApiClient, reporter: str, instance: str, clock: Clock = SYSTEM_CLOCK, chance: random.Random = SYSTEM_CHANCE
    ) -> None:
        self._clock = clock
        self._chance = chance
        self._api: Any = api  # the client has no types
        self._reporter = reporter
        self._instance = instance
        self._told: dict[str, float] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, *, reporter: str, instance: str) -> AsyncIterator[Cluster]:
        """The cluster this pod runs in; outside of one that of `KUBECONFIG`. Events name `reporter` and `instance`.

        Raises:
            ClusterError: there is neither a service account nor a kubeconfig that can be used.
        """
        configuration = client.Configuration()
        try:
            config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
        except config.ConfigException as inside:
            try:
                await config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)  # type: ignore[no-untyped-call]
            except Exception as error:  # whatever a file that is none leads its reader to
                why = f"no service account ({inside}) and no kubeconfig ({' '.join(str(error).split())}); run in a pod, or set KUBECONFIG"
                raise ClusterError(0, "Kubernetes' API cannot be found", why) from error
        async with client.ApiClient(configuration) as api:
            yield cls(api, reporter, instance)

    async def get(self, resource: Resource, namespace: str, name: str, kind: type[T], subresource: str = "") -> T:
        """Raises: NotFound, ClusterError."""
        path = resource.path(namespace, name, subresource)
        try:
            return msgspec.json.decode(await self._call("GET", path), type=kind)
        except msgspec.MsgspecError as error:
            raise ClusterError(0, f"GET {path}", f"the answer is not as its schema says: {error}") from error

    async def version(self) -> tuple[str, float]:
        """What its server is, as `Kubernetes v1.36.1`, and the time there, in seconds since 1970. Raises ClusterError."""
        bound = aiohttp.ClientTimeout(total=_REQUEST_SECONDS, sock_connect=10)
        async with self._open("GET", "/version", None, bound=bound, what="GET /version") as response:
            try:
                found = msgspec.json.decode(await response.read(), type=_Version)
                wall = parsedate_to_datetime(response.headers["Date"]).timestamp()
            except (msgspec.MsgspecError, LookupError, ValueError) as error:
                raise ClusterError(0, "GET /version", f"this is no API server of Kubernetes: {error}") from error
        return f"Kubernetes {found.git_version}", wall

    async def text(self, path: str, query: Mapping[str, str] | None = None) -> str:
        """What is at a path that is no object: a pod's log, or a page of one, through the API server. Raises: NotFound, ClusterError."""
        return (await self._call("GET", path, query)).decode(errors="replace")

    async def page(self, resource: Resource, namespace: str, query: Mapping[str, str]) -> Page:
        """One page of a list; `query` as the API has it (labelSelector, limit, continue, …). Raises: Expired, ClusterError."""
        found = msgspec.json.decode(await self._call("GET", resource.path(namespace), query), type=_List)
        return Page(found.items or [], found.metadata.resource_version, found.metadata.continue_)

    async def every(self, resource: Resource, kind: type[T], namespace: str = "", labels: str = "") -> list[T]:
        """All of them, page by page. Raises: ClusterError; msgspec.MsgspecError: one is none of that kind."""
        query = {"limit": "500"} | ({"labelSelector": labels} if labels else {})
        found: list[T] = []
        while True:
            page = await self.page(resource, namespace, query)
            found += [msgspec.json.decode(each, type=kind) for each in page.items]
            if not page.next:
                return found
            query["continue"] = page.next

    async def watch(self, resource: Resource, namespace: str, query: Mapping[str, str]) -> AsyncIterator[tuple[str, msgspec.Raw]]:
        """Events (type, object) until the server ends the stream. Raises: Expired: list again; ClusterError."""
        seconds = float(query["timeoutSeconds"])
        # A bookmark comes every minute: two minutes of silence are a connection that is dead on one side only.
        bound = aiohttp.ClientTimeout(total=seconds + 30, sock_connect=10, sock_read=min(130.0, seconds + 30))
        what = f"watching {resource.plural}"
        async with self._open("GET", resource.path(namespace), {**query, "watch": "true"}, bound=bound, what=what) as response:
            while line := await response.content.readline():  # of 4 MiB at most, by the client's own buffer; an object has 1.5
                event = msgspec.json.decode(line, type=_WatchEvent)
                if event.type == "ERROR":
                    failure = msgspec.json.decode(event.object, type=_Failure)
                    if failure.code == _GONE:
                        raise Expired(failure.message)
                    raise ClusterError(failure.code, what, failure.message)
                yield event.type, event.object

    def follow(self, resource: Resource, kind: type[T], *, namespace: str = "", labels: str = "", fields: str = "") -> Informer[T]:
        """An informer of these objects, in all namespaces unless one is given; it starts with `async with`."""
        selectors = {"labelSelector": labels, "fieldSelector": fields}
        return Informer(self, resource, kind, namespace, {key: value for key, value in selectors.items() if value})

    async def create(self, resource: Resource, namespace: str, body: Mapping[str, object]) -> bytes:
        """Raises: Conflict: the name is taken; ClusterError."""
        full = {"apiVersion": resource.api, "kind": resource.kind, **body}
        return await self._call("POST", resource.path(namespace), body=full)

    async def patch(self, resource: Resource, namespace: str, name: str, body: Mapping[str, object], *, subresource: str = "") -> bytes:
        """A merge patch. With metadata.resourceVersion in it, it counts for that version only. Raises: NotFound, Conflict, ClusterError."""
        return await self._call("PATCH", resource.path(namespace, name, subresource), body=body, content=MERGE)

    async def delete(self, resource: Resource, namespace: str, name: str, *, uid: str = "", grace: int | None = None) -> None:
        """Asks for the object's deletion; one that is gone already is fine. With `uid`: that one and no later one of its name."""
        options: dict[str, object] = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid:
            options["preconditions"] = {"uid": uid}
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        try:
            await self._call("DELETE", resource.path(namespace, name), body=options)
        except NotFound:
            pass
        except Conflict:
            if not uid:
                raise

    async def event(
        self,
        about: Resource,
        metadata: Identity,
        kind: Literal["Normal", "Warning"],
        reason: str,
        note: str,
        action: str,
    ) -> None:
        """Writes an event about the object; about one without a namespace in that of the cluster's own, `default`. Best effort: a failure
        is logged, since nothing may depend on events."""
        home = metadata.namespace or "default"
        key = hashlib.blake2b(f"{metadata.uid}\0{reason}\0{note}".encode(), digest_size=8).hexdigest()
        now = self._clock.now()
        if now - self._told.pop(key, -_EVENT_REPEAT_SECONDS) < _EVENT_REPEAT_SECONDS:
            self._told[key] = now
            return
        self._told[key] = now
        while len(self._told) > _EVENTS_KEPT:
            del self._told[next(iter(self._told))]
        regarding = {"apiVersion": about.api, "kind": about.kind, "namespace": metadata.namespace, "name": metadata.name}
        body = {
            "metadata": {"name": f"{metadata.name[:200].rstrip('.-')}.{token(self._chance, 8)}", "namespace": home},
            "eventTime": timestamp(self._clock.wall(), "microseconds"),
            "reportingController": self._reporter,
            "reportingInstance": self._instance[:128],
            "regarding": {**regarding, "uid": metadata.uid, "resourceVersion": metadata.resource_version},
            "type": kind,
            "reason": reason,
            "action": action,
            "note": fitted(note, 1000),
        }
        try:
            await self.create(EVENTS, home, body)
        except ClusterError as error:
            log.warning("the event %s of %s/%s is lost: %s", reason, home, metadata.name, error)

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        body: Mapping[str, object] | None = None,
        content: str = "application/json",
    ) -> bytes:
        bound = aiohttp.ClientTimeout(total=_REQUEST_SECONDS, sock_connect=10)
        async with self._open(method, path, query, body=body, content=content, bound=bound, what=f"{method} {path}") as response:
            return await response.read()

    @contextlib.asynccontextmanager
    async def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        *,
        body: Mapping[str, object] | None = None,
        content: str = "application/json",
        bound: aiohttp.ClientTimeout,
        what: str,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer, once its head says that all is well. Raises: ClusterError, Expired."""
        headers = {"Accept": "application/json", "Content-Type": content}
        try:
            call = await self._api.param_serialize(
                method, path, query_params=list((query or {}).items()), header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            answer = await self._api.call_api(*call, _request_timeout=bound)
            response: aiohttp.ClientResponse = answer.response
            try:
                if response.status >= 400:
                    raise _refused(response.status, what, await response.read())
                yield response
            finally:
                if response.content.at_eof():
                    response.release()
                else:
                    response.close()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ClusterError(0, what, f"no answer from Kubernetes' API: {error or type(error).__name__}") from error


def _refused(status: int, what: str, body: bytes) -> Exception:
    try:
        message = msgspec.json.decode(body, type=_Failure).message
    except msgspec.DecodeError:
        message = body[:200].decode(errors="replace")
    if status == _GONE:
        return Expired(message)
    kind = {404: NotFound, 409: Conflict}.get(status, ClusterError)
    return kind(status, what, message or "no reason given")
