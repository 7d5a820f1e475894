"""`kubectl explain modelsnapshot.…` says something of every field, and every column of `kubectl get` is of a field that there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CRD = Path(__file__).parents[2] / "deploy/helm/zerowake/templates/crd.yaml"
KUBERNETES_OWN = ".metadata"  # of every object: the API server explains it, and takes no description for it

Schema = dict[str, Any]


def version() -> Schema:
    """What the chart installs, less what Helm fills in, which is in labels alone."""
    definition = yaml.safe_load(re.sub(r"\{\{.*?\}\}", "", CRD.read_text(), flags=re.DOTALL))
    (found,) = definition["spec"]["versions"]
    return dict(found)


def fields(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Of all depths, as `kubectl explain --recursive` lists them."""
    if "items" in schema:
        schema = schema["items"]
    for name, each in schema.get("properties", {}).items():
        yield f"{path}.{name}", each
        yield from fields(each, f"{path}.{name}")


def test_every_field_is_explained() -> None:
    schema = version()["schema"]["openAPIV3Schema"]
    found = dict(fields(schema))
    assert len(found) > 60
    assert schema["description"]
    assert [path for path, each in found.items() if not each.get("description", "").strip() and path != KUBERNETES_OWN] == []


def test_what_is_explained_is_a_sentence() -> None:
    schema = version()["schema"]["openAPIV3Schema"]
    assert [path for path, each in fields(schema) if path != KUBERNETES_OWN and not each["description"].strip().endswith(".")] == []


def test_every_column_is_of_a_field() -> None:
    found = dict(fields(version()["schema"]["openAPIV3Schema"]))
    for column in version()["additionalPrinterColumns"]:
        path = re.sub(r"\[\?\(.*?\)\]", "", column["jsonPath"])
        assert path in found or path == ".metadata.creationTimestamp", column
