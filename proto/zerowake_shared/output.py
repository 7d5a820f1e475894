"""How a command prints what it has found: for people, or for programs."""

from __future__ import annotations

import enum
import json
from typing import Annotated, Any

import typer
import yaml


class Format(enum.Enum):
    """How it is printed."""

    TEXT = "text"
    JSON = "json"
    YAML = "yaml"


Output = Annotated[Format, typer.Option("--output", "-o", help="How to print it.")]


def printed(found: Any, output: Format) -> None:
    """JSON's types as JSON, or as YAML."""
    typer.echo(json.dumps(found, indent=2) if output is Format.JSON else yaml.safe_dump(found, sort_keys=False, width=140).rstrip())
