"""What a ModelSnapshot declares of the sources of its model's demand, checked: the kinds and fields of `zerowake up`, and fewer places.

What is not understood or not permitted is refused by name, with what to do, and is no reason to take the others for the whole demand: a
refused source is as unknown as a silent one. Rejected: to check all of it in the schema of the resource, which cannot say what to do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from scaler.kubernetes.declarations import Models
from scaler.kubernetes.resources import ModelSnapshot
from scaler.kubernetes.service_lookup import service_of
from scaler.sources.declared import Declared
from scaler.sources.engine_metrics import EngineDeclaration
from scaler.sources.prometheus import PrometheusDeclaration
from scaler.sources.redis_declaration import RedisDeclaration
from scaler.sources.source import Declaration, Refused
from scaler.sources.watch import Sources

_READ: TypeAdapter[Declared] = TypeAdapter(Declared)
_CREDENTIALS = ("password_file", "password_env")
_NO_CREDENTIALS = "on Kubernetes no source has credentials: leave it out, and name a server that this namespace may ask without any"


class _NotPermitted(Exception):
    """field: of the declaration."""

    def __init__(self, field: str, why: str) -> None:
        self.field = field
        super().__init__(why)


def declare_sources(models: Models, sources: Sources, hosts: Collection[str]) -> None:
    """Keeps `sources` as the models' ModelSnapshots declare them. hosts: that every namespace may name, in lower case."""

    def changed(model: str) -> None:
        snapshot = models.with_sources(model)
        sources.declare(model, sources_of(snapshot, hosts) if snapshot else ())

    models.on_sources(changed)


def sources_of(snapshot: ModelSnapshot, hosts: Collection[str]) -> list[Declaration]:
    """Its sources, in their order; those that are refused as Refused."""
    return [
        _source(f"spec.sources[{number}]", each, snapshot.metadata.namespace, hosts) for number, each in enumerate(snapshot.spec.sources)
    ]


def _source(where: str, written: Mapping[str, Any], namespace: str, hosts: Collection[str]) -> Declaration:
    try:
        _permit_no_credentials(written)
        declared = _READ.validate_python(written)
        _permit(declared, namespace, hosts)
    except ValidationError as error:
        why = "; ".join(f"{_field(where, each['loc'])}: {each['msg'].removeprefix('Value error, ')}" for each in error.errors())
    except _NotPermitted as error:
        why = f"{where}.{error.field}: {error}"
    except ValueError as error:
        why = f"{where}.url: {error}"
    else:
        return declared
    return Refused(type=str(written.get("type", "")), why=" ".join(why.split()))


def _permit_no_credentials(written: Mapping[str, Any]) -> None:
    """Before it is read, which would advise how to give them. Raises: _NotPermitted; ValueError: its URL is none."""
    for field in _CREDENTIALS:
        if field in written:
            raise _NotPermitted(field, _NO_CREDENTIALS)
    if "@" in urlsplit(str(written.get("url", ""))).netloc:
        raise _NotPermitted("url", f"it has a user in it: {_NO_CREDENTIALS}")


def _field(where: str, loc: tuple[int | str, ...]) -> str:
    """Behind the kind, which pydantic names first."""
    return ".".join([where, *(str(each) for each in loc[1:])])


def _permit(declared: Declaration, namespace: str, hosts: Collection[str]) -> None:
    """Raises: _NotPermitted."""
    if isinstance(declared, EngineDeclaration | PrometheusDeclaration | RedisDeclaration) and declared.url:
        _permit_url(declared, declared.url, namespace, hosts)


def _permit_url(declared: Declaration, url: str, namespace: str, hosts: Collection[str]) -> None:
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    if host in hosts:
        return
    add = f"have an administrator add {host} to the chart's value scaler.sources.hosts"
    if parts.scheme == "unix":
        raise _NotPermitted(
            "url", f"no socket of the scaler's machine is asked: name a Service of this namespace, as in NAME.{namespace}.svc"
        )
    named = service_of(host)
    if named is None or named[0] != namespace:
        raise _NotPermitted("url", f"{host} is no Service of this namespace: name one, as in NAME.{namespace}.svc, or {add}")
    if isinstance(declared, EngineDeclaration):
        raise _NotPermitted(
            "url",
            "whether a Service leads to replicas that the gateways ask, too, is not known, and their requests would count twice: leave url"
            f" out for the model's own replicas; for an engine that is none of them {add}",
        )
    if plain := {"rediss": "redis", "https": "http"}.get(parts.scheme):
        raise _NotPermitted("url", f"no authority that could vouch for a Service can be named: write {plain}://{host}, or {add}")
