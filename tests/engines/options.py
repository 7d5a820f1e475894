"""The options of an engine's command line in one release: every spelling of each, and what it takes, by what its source declares."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass

from tests.engines.releases import Release


@dataclass(frozen=True)
class Option:
    """One option, under all its names. `type`: the annotation of the field that it sets; None: it was found nowhere."""

    names: frozenset[str]
    type: str | None

    def takes(self, value: str | None) -> bool:
        """Whether a word fits; None: no word follows."""
        if self.type is None:
            return False
        kinds = {node.id for node in ast.walk(ast.parse(self.type, mode="eval")) if isinstance(node, ast.Name)}
        if value is None or kinds <= {"bool"}:
            return value is None and "bool" in kinds
        return any(kind in kinds and _is(kind, value) for kind in ("str", "int", "float", "dict"))


def of_vllm(release: Release) -> dict[str, Option]:
    """By each name. An option is an `add_argument` of the engine's arguments, or a field of the API server's."""
    found: dict[str, Option] = {}
    fields = dict(_fields(release.text("vllm/engine/arg_utils.py"), "EngineArgs"))
    places = sorted(file for file in release.files if file.startswith("vllm/entrypoints/") and file.endswith("/cli_args.py"))
    for file in places:
        for owner in ("BaseFrontendArgs", "FrontendArgs"):
            for name, type in _fields(release.text(file), owner):
                found[_dashed(name)] = Option(frozenset({_dashed(name)}), type)
    for file in ("vllm/engine/arg_utils.py", *places):
        for node in ast.walk(ast.parse(release.text(file))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument"):
                names = frozenset(_words(node.args))
                type = next((fields[field] for name in names if (field := name.lstrip("-").replace("-", "_")) in fields), None)
                said = next((ast.unparse(each.value) for each in node.keywords if each.arg == "type"), None)
                found |= dict.fromkeys(names, Option(names, type or said))
    return found


def of_sglang(release: Release) -> dict[str, Option]:
    """By each name. An option is a field of its server's arguments, annotated `A[TYPE, …]`, which may have more names."""
    found: dict[str, Option] = {}
    places = [file for file in release.files if file.startswith("sglang/srt/arg_groups/fields/") and file.endswith(".py")]
    for file in ("sglang/srt/server_args.py", *sorted(places)):
        for node in ast.walk(ast.parse(release.text(file))):
            match node:
                case ast.AnnAssign(target=ast.Name(id=name), annotation=ast.Subscript(value=ast.Name(id="A"), slice=ast.Tuple(elts=said))):
                    aliases = [
                        keyword.value
                        for call in said
                        if isinstance(call, ast.Call)
                        for keyword in call.keywords
                        if keyword.arg == "aliases" and isinstance(keyword.value, ast.List)
                    ]
                    names = frozenset({_dashed(name), *(word for each in aliases for word in _words(each.elts))})
                    found |= dict.fromkeys(names, Option(names, ast.unparse(said[0])))
    return found


def _fields(text: str, owner: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for each in node.body:
                if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                    yield each.target.id, ast.unparse(each.annotation)


def _words(nodes: list[ast.expr]) -> list[str]:
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("-")]


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is(kind: str, value: str) -> bool:
    try:
        match kind:
            case "int":
                int(value)
            case "float":
                float(value)
            case "dict":
                return isinstance(json.loads(value), dict)
    except ValueError:
        return False
    return True
