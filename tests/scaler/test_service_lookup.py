"""Where sources' hosts are, by what the API server says of Services."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from scaler.kubernetes.service_lookup import ServiceLookup, service_of
from scaler.sources.source import SourceError
from tests.worlds.kubernetes_api import Api


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
async def lookup(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ServiceLookup]:
    async with api.connected(tmp_path, monkeypatch) as cluster:
        yield ServiceLookup(cluster, {"localhost", "127.0.0.9", "nowhere.invalid"})


async def service(api: Api, name: str, **spec: str) -> None:
    await api.put("services", {"metadata": {"name": name, "namespace": "tenant"}, "spec": spec})


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("queue.tenant.svc", ("tenant", "queue")),
        ("queue.tenant.svc.cluster.local", ("tenant", "queue")),
        ("queue.tenant.svc.corp.example", ("tenant", "queue")),
        ("queue.tenant.svc.", None),
        ("queue.tenant", None),
        ("a.queue.tenant.svc", None),
        ("queue.tenant.svc.c_d", None),
        ("-queue.tenant.svc", None),
        ("", None),
    ],
)
def test_names_of_services(host: str, found: tuple[str, str] | None) -> None:
    assert service_of(host) == found


async def test_a_service_is_where_the_api_server_says(api: Api, lookup: ServiceLookup) -> None:
    await service(api, "queue", type="ClusterIP", clusterIP="10.96.0.7")
    assert await lookup.addresses("queue.tenant.svc") == ["10.96.0.7"]
    assert await lookup.addresses("Queue.tenant.svc.cluster.local") == ["10.96.0.7"]
    await service(api, "queue", clusterIP="fd00::7")
    assert await lookup.addresses("queue.tenant.svc") == ["fd00::7"]


async def test_a_service_that_leads_elsewhere_is_not_followed(api: Api, lookup: ServiceLookup) -> None:
    await service(api, "queue", type="ExternalName", externalName="169.254.169.254.nip.example", clusterIP="10.96.0.7")
    with pytest.raises(SourceError, match=r"ExternalName, which leads out of its namespace: name the host itself"):
        await lookup.addresses("queue.tenant.svc")


async def test_services_that_have_no_address(api: Api, lookup: ServiceLookup) -> None:
    with pytest.raises(SourceError, match="there is no Service queue in namespace tenant"):
        await lookup.addresses("queue.tenant.svc")
    await service(api, "queue", clusterIP="None")
    with pytest.raises(SourceError, match="make one beside it that is not headless"):
        await lookup.addresses("queue.tenant.svc")
    api.refuse.append(("GET", "/services/queue", 403, "forbidden"))
    with pytest.raises(SourceError, match=r"where Service queue of namespace tenant is cannot be found out: .*forbidden"):
        await lookup.addresses("queue.tenant.svc")


async def test_hosts_that_the_administrator_names(lookup: ServiceLookup, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(host: str, *_: object, **__: object) -> list[object]:
        """As a machine with such a name in its /etc/hosts, which not each machine has."""
        assert host == "localhost"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", found)
        assert await lookup.addresses("LocalHost") == ["127.0.0.1"]
    assert await lookup.addresses("127.0.0.9") == ["127.0.0.9"]
    with pytest.raises(SourceError, match=r"the host nowhere\.invalid cannot be found: "):
        await lookup.addresses("nowhere.invalid")
    with pytest.raises(SourceError, match=r"127\.0\.0\.1 is no Service of this cluster"):
        await lookup.addresses("127.0.0.1")
