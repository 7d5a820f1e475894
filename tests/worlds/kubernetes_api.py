"""Kubernetes' API over HTTP, small enough to break at will: lists in pages, watches from a version on, merge patches, finalizers.

The real API server is in tests/e2e; this one is for what that one does rarely: streams cut in the middle, versions that are too old,
bookmarks only, conflicts and refusals at a chosen moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from zerowake_shared.kubernetes.cluster import Cluster

Key = tuple[str, str, str]  # plural, namespace, name


class Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class Api:
    def __init__(self) -> None:
        self.objects: dict[Key, dict[str, Any]] = {}
        self.log: list[tuple[int, str, Key, dict[str, Any]]] = []
        self.requests: list[tuple[str, str]] = []
        self.refuse: list[tuple[str, str, int, str]] = []  # (method, part of the path, status, message): once each
        self.page = 500
        self.oldest = 0  # versions before it are too old to watch from
        self.hung = False
        self.tokens: dict[str, str] = {}  # of the audience `zerowake`, and whose they are
        self.forbidden: set[tuple[str, str]] = set()  # (verb, plural) that an access review denies
        self.texts: dict[str, str] = {}  # by path: logs of pods, and pages of theirs
        self.date = ""  # of its answers, as HTTP writes it; empty: the real one
        self._versions = itertools.count(1)
        self.version = 0
        self._changed = asyncio.Condition()
        self._streams: set[web.StreamResponse] = set()
        self._uids = itertools.count(1)

    @contextlib.asynccontextmanager
    async def connected(self, folder: Path, monkeypatch: pytest.MonkeyPatch, reporter: str = "zerowake.dev/test") -> AsyncIterator[Cluster]:
        """Yields a client of it, as the environment's kubeconfig leads there."""
        async with self.serve(folder) as config:
            monkeypatch.setenv("KUBECONFIG", str(config))
            async with Cluster.connect(reporter=reporter, instance="test") as cluster:
                yield cluster

    @contextlib.asynccontextmanager
    async def serve(self, folder: Path) -> AsyncIterator[Path]:
        """Yields a kubeconfig."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        config = folder / "kubeconfig"
        config.write_text(
            json.dumps(
                {
                    "current-context": "test",
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                    "clusters": [{"name": "test", "cluster": {"server": f"http://{host}:{port}"}}],
                    "users": [{"name": "test", "user": {}}],
                }
            )
        )
        try:
            yield config
        finally:
            await self.cut()
            await runner.cleanup()

    # --- what tests do to it

    def get(self, plural: str, namespace: str, name: str) -> dict[str, Any] | None:
        return self.objects.get((plural, namespace, name))

    def all(self, plural: str) -> list[dict[str, Any]]:
        return [found for (kind, _, _), found in self.objects.items() if kind == plural]

    async def put(self, plural: str, found: dict[str, Any]) -> dict[str, Any]:
        """Creates or replaces, whatever a client could do."""
        metadata = found["metadata"]
        key = (plural, metadata.get("namespace", ""), metadata["name"])
        old = self.objects.get(key)
        metadata.setdefault("uid", old["metadata"]["uid"] if old else f"uid-{next(self._uids)}")
        metadata["generation"] = old["metadata"]["generation"] + (old.get("spec") != found.get("spec")) if old else 1
        await self._store("MODIFIED" if old else "ADDED", key, found)
        return found

    async def change(self, plural: str, namespace: str, name: str, patch: dict[str, Any]) -> None:
        await self.put(plural, _merged(self.objects[plural, namespace, name], patch))

    async def remove(self, plural: str, namespace: str, name: str) -> None:
        await self._store("DELETED", (plural, namespace, name), self.objects[plural, namespace, name])

    async def cut(self) -> None:
        """Breaks every open watch in the middle of a line."""
        streams, self._streams = list(self._streams), set()
        for stream in streams:
            with contextlib.suppress(ConnectionError):
                await stream.write(b'{"type":"MODI')
            if stream._req is not None and stream._req.transport is not None:
                stream._req.transport.abort()
        async with self._changed:
            self._changed.notify_all()

    async def bookmark(self) -> None:
        self.version = next(self._versions)
        async with self._changed:
            self.log.append((self.version, "BOOKMARK", ("", "", ""), {"metadata": {"resourceVersion": str(self.version)}}))
            self._changed.notify_all()

    def forget(self) -> None:
        """All versions so far are too old from now on."""
        self.oldest = self.version + 1

    # --- requests

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        while self.hung:
            await asyncio.sleep(0.02)
        try:
            for each in self.refuse:
                if each[0] == request.method and each[1] in request.path_qs:
                    self.refuse.remove(each)
                    raise Refusal(each[2], each[3])
            if request.path == "/version":
                return web.json_response({"gitVersion": "v1.36.1"}, headers={"Date": self.date} if self.date else None)
            if request.path in self.texts:
                return web.Response(text=self.texts[request.path])
            return await self._answer(request)
        except Refusal as refusal:
            body = {"kind": "Status", "code": refusal.status, "message": str(refusal)}
            return web.json_response(body, status=refusal.status)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        parts = parts[2:] if parts[0] == "api" else parts[3:]
        namespace = ""
        if parts[0] == "namespaces" and len(parts) > 2:
            namespace, parts = parts[1], parts[2:]
        plural, name, subresource = parts[0], *(*parts[1:], "", "")[:2]
        key = (plural, namespace, name)
        if request.method == "GET" and not name:
            return await (self._watch if request.query.get("watch") else self._list)(request, plural, namespace)
        if plural.endswith("reviews"):
            return self._review((await request.json())["spec"])
        if request.method == "POST":
            return await self._create(plural, namespace, await request.json())
        found = self.objects.get(key)
        if found is None:
            raise Refusal(404, f"{plural} {name!r} not found")
        if request.method == "GET":
            return web.json_response(found)
        if request.method == "DELETE":
            return await self._delete(key, found, await request.json())
        return await self._patch(key, found, await request.json(), subresource)

    def _review(self, spec: dict[str, Any]) -> web.Response:
        """Of a token, or of whether somebody may do something."""
        if wanted := spec.get("resourceAttributes"):
            allowed = (wanted["verb"], wanted["resource"]) not in self.forbidden
            return web.json_response({"status": {"allowed": allowed}}, status=201)
        user = self.tokens.get(spec["token"])
        if user is None or spec["audiences"] != ["zerowake"]:
            return web.json_response({"status": {"authenticated": False, "error": "invalid bearer token"}}, status=201)
        status = {"authenticated": True, "audiences": ["zerowake"], "user": {"username": user}}
        return web.json_response({"kind": "TokenReview", "status": status}, status=201)

    async def _list(self, request: web.Request, plural: str, namespace: str) -> web.Response:
        found = [each for key, each in sorted(self.objects.items()) if _selected(request, plural, namespace, key, each)]
        start = int(request.query.get("continue", "0"))
        size = min(self.page, int(request.query.get("limit", "500")))
        after = str(start + size) if start + size < len(found) else ""
        body = {"metadata": {"resourceVersion": str(self.version), "continue": after}, "items": found[start : start + size]}
        return web.json_response(body)

    async def _watch(self, request: web.Request, plural: str, namespace: str) -> web.StreamResponse:
        seen = int(request.query["resourceVersion"])
        response = web.StreamResponse()
        await response.prepare(request)
        self._streams.add(response)
        try:
            while response in self._streams:
                if seen < self.oldest - 1:
                    error = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old resource version"}}
                    await response.write(json.dumps(error).encode() + b"\n")
                    return response
                news = [each for each in self.log if each[0] > seen]
                for version, kind, key, found in news:
                    seen = version
                    if kind == "BOOKMARK" or _selected(request, plural, namespace, key, found):
                        await response.write(json.dumps({"type": kind, "object": found}).encode() + b"\n")
                await self._news(seen, response)
        finally:
            self._streams.discard(response)
        return response

    async def _news(self, seen: int, stream: web.StreamResponse) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.version > seen or stream not in self._streams)

    async def _create(self, plural: str, namespace: str, body: dict[str, Any]) -> web.Response:
        metadata = body["metadata"]
        if (plural, namespace, metadata["name"]) in self.objects:
            raise Refusal(409, f"{plural} {metadata['name']!r} already exists")
        metadata["namespace"] = namespace
        return web.json_response(await self.put(plural, body), status=201)

    async def _delete(self, key: Key, found: dict[str, Any], options: dict[str, Any]) -> web.Response:
        if (options.get("preconditions") or {}).get("uid", found["metadata"]["uid"]) != found["metadata"]["uid"]:
            raise Refusal(409, "the UID in the precondition does not match")
        if found["metadata"].get("finalizers"):
            await self.change(*key, {"metadata": {"deletionTimestamp": "2026-11-22T06:00:00Z"}})
        else:
            await self._store("DELETED", key, found)
        return web.json_response({"kind": "Status", "status": "Success"})

    async def _patch(self, key: Key, found: dict[str, Any], patch: dict[str, Any], subresource: str) -> web.Response:
        version = (patch.get("metadata") or {}).get("resourceVersion")
        if version not in (None, found["metadata"]["resourceVersion"]):
            raise Refusal(409, "the object has been modified; please apply your changes to the latest version and try again")
        allowed = {"status"} if subresource == "status" else set(patch) - {"status"}
        new = _merged(found, {name: value for name, value in patch.items() if name in allowed})
        if new["metadata"].get("deletionTimestamp") and not new["metadata"].get("finalizers"):
            await self._store("DELETED", key, new)
        elif new != found:
            await self.put(key[0], new)
        return web.json_response(new)

    async def _store(self, kind: str, key: Key, found: dict[str, Any]) -> None:
        self.version = next(self._versions)
        found["metadata"]["resourceVersion"] = str(self.version)
        if kind == "DELETED":
            self.objects.pop(key, None)
        else:
            self.objects[key] = found
        async with self._changed:
            self.log.append((self.version, kind, key, copy.deepcopy(found)))
            self._changed.notify_all()


def _selected(request: web.Request, plural: str, namespace: str, key: Key, found: dict[str, Any]) -> bool:
    label, _, value = request.query.get("labelSelector", "").partition("=")
    labels = found["metadata"].get("labels") or {}
    wanted = not label or (label in labels and value in ("", labels[label]))
    return key[0] == plural and namespace in ("", key[1]) and wanted


def _merged(found: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    new = dict(found) if isinstance(found, dict) else {}
    for name, value in patch.items():
        if value is None:
            new.pop(name, None)
        else:
            new[name] = _merged(new.get(name), value)
    return copy.deepcopy(new)
