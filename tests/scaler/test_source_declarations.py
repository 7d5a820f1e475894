"""What ModelSnapshots may declare of sources, and what is said of what they may not."""

from __future__ import annotations

from typing import Any

import pytest

from scaler.books.ledger import Ledger
from scaler.kubernetes.declarations import Models
from scaler.kubernetes.source_declarations import declare_sources, sources_of
from scaler.sources.cron import CronDeclaration
from scaler.sources.engine_metrics import EngineDeclaration
from scaler.sources.prometheus import PrometheusDeclaration
from scaler.sources.push_declaration import PushDeclaration
from scaler.sources.redis_declaration import RedisDeclaration
from scaler.sources.source import Declaration, Refused
from scaler.sources.watch import Sources
from tests.worlds.declared import Informer, declared_snapshot

HOSTS = frozenset({"prometheus.example", "10.1.2.3"})
CRON = {"type": "cron", "timezone": "UTC", "start": "0 8 * * *", "end": "0 18 * * *", "desired": 2}


def read(*sources: dict[str, Any]) -> list[Declaration]:
    return sources_of(declared_snapshot("tenant/a", 1, sources=sources), HOSTS)


def refused(**source: Any) -> str:
    (found,) = read(source)
    assert isinstance(found, Refused)
    return found.why


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ({"type": "redis", "url": "redis://queue.tenant.svc:6379/0", "list": "jobs"}, RedisDeclaration),
        ({"type": "redis", "url": "redis://queue.tenant.svc.cluster.local", "stream": "jobs", "group": "g"}, RedisDeclaration),
        ({"type": "redis", "url": "rediss://10.1.2.3", "list": "jobs"}, RedisDeclaration),
        ({"type": "prometheus", "url": "http://prometheus.tenant.svc:9090", "query": "up"}, PrometheusDeclaration),
        ({"type": "prometheus", "url": "https://Prometheus.Example/prefix", "query": "up", "interval_seconds": 5}, PrometheusDeclaration),
        ({"type": "engine", "url": "http://prometheus.example:8000/metrics"}, EngineDeclaration),
        ({"type": "engine"}, EngineDeclaration),
        ({"type": "push", "by": "b"}, PushDeclaration),
        (CRON, CronDeclaration),
    ],
)
def test_what_zerowake_up_takes_is_taken(written: dict[str, Any], kind: type[Declaration]) -> None:
    assert read(written) == [kind.model_validate(written)]


@pytest.mark.parametrize(
    "url",
    [
        "redis://queue.other.svc",
        "redis://queue.tenant.svc.",
        "redis://queue.tenant.svcx",
        "redis://queue.tenant",
        "redis://0.queue.tenant.svc",
        "redis://queue",
        "redis://127.0.0.1",
        "redis://[::1]:6379",
        "redis://10.1.2.4",
        "redis://169.254.169.254",
        "redis://queue.tenant.svc%2eevil",
        "redis://prometheus.example.evil",
    ],
)
def test_no_other_place_is_asked(url: str) -> None:
    why = refused(type="redis", url=url, list="jobs")
    assert why.startswith("spec.sources[0].url: ") and "is no Service of this namespace: name one, as in NAME.tenant.svc" in why
    assert why.endswith("to the chart's value scaler.sources.hosts")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ({"type": "redis", "url": "unix:///run/redis.sock", "list": "jobs"}, "url: no socket of the scaler's machine is asked"),
        (
            {"type": "redis", "url": "redis://queue.tenant.svc", "list": "jobs", "password_file": "/x"},
            "password_file: on Kubernetes no source",
        ),
        (
            {"type": "redis", "url": "redis://queue.tenant.svc", "list": "jobs", "password_env": "HOME"},
            "password_env: on Kubernetes no source",
        ),
        ({"type": "redis", "url": "redis://me@queue.tenant.svc", "list": "jobs"}, "url: it has a user in it: on Kubernetes no source has"),
        ({"type": "redis", "url": "redis://:hush@10.1.2.3", "list": "jobs"}, "url: it has a user in it: on Kubernetes no source has"),
        ({"type": "redis", "url": "rediss://queue.tenant.svc", "list": "jobs"}, "write redis://queue.tenant.svc, or have an administrator"),
        ({"type": "prometheus", "url": "https://p.tenant.svc", "query": "up"}, "write http://p.tenant.svc, or have an administrator"),
        ({"type": "prometheus", "url": "http://[::1", "query": "up"}, "url: Invalid IPv6 URL"),
        ({"type": "prometheus", "query": "up"}, "url: Field required"),
        ({"type": "prometheus", "url": "http://p.tenant.svc", "qeury": "up"}, "qeury: Extra inputs are not permitted"),
        ({"type": "redis", "url": "redis://queue.tenant.svc"}, "give either list or stream"),
        ({"type": "cron", "timezone": "Nowhere"}, "timezone: 'Nowhere' is no time zone"),
        ({"type": "engine", "url": "http://chat.tenant.svc:8000/metrics"}, "url: whether a Service leads to replicas"),
        ({"type": "push", "token": "x"}, "token: Extra inputs are not permitted"),
        ({"type": "rabbitmq"}, "does not match any of the expected tags"),
    ],
)
def test_what_is_refused_names_its_field(source: dict[str, Any], why: str) -> None:
    assert why in refused(**source) and "hush" not in refused(**source)


def test_one_that_is_refused_does_not_hide_the_others() -> None:
    redis = {"type": "redis", "url": "redis://queue.tenant.svc", "list": "jobs"}
    assert [type(each) for each in read(redis, {**redis, "url": "redis://queue.other.svc"}, CRON)] == [
        RedisDeclaration,
        Refused,
        CronDeclaration,
    ]
    assert read({"type": "redis"}, {"type": "cron"})[1] != read({"type": "cron"}, {"type": "redis"})[0], "each says where it stands"


async def test_the_ledger_hears_of_what_counts_and_of_what_was_refused() -> None:
    """A refused source is unknown: what it was meant to say may be what replicas are there for."""
    ledger, snapshots = Ledger(), Informer()
    models = Models(ledger)
    models.follow(snapshots, Informer())
    always = {**CRON, "start": "0 0 1 1 *", "end": "59 23 31 12 *"}
    async with Sources(ledger) as sources:
        declare_sources(models, sources, HOSTS)
        snapshots.put(declared_snapshot("tenant/a", 1, sources=[{"type": "engine", "url": "http://10.0.0.1"}]))
        elsewhere = ledger.demand_anywhere("m").elsewhere
        assert "source engine of model m is refused: spec.sources[0].url: 10.0.0.1 is no Service" in elsewhere.unknown
        assert not ledger.demand_anywhere("m").idle
        snapshots.put(declared_snapshot("hostile/a", 2, sources=[always]))
        assert ledger.demand_anywhere("m").elsewhere == elsewhere, "the model is another namespace's"
        snapshots.put(declared_snapshot("tenant/a", 1))
        assert ledger.demand_anywhere("m").idle and not sources.states()
        snapshots.drop("tenant/a")
        assert [each.says for each in sources.states_of("m")] == ["0 0 1 1 * to 59 23 31 12 *, UTC"]
        snapshots.drop("hostile/a")
        assert not sources.states() and not ledger.knows("m")
