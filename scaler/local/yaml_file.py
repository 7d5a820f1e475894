"""A YAML file as users write it, more strictly than YAML has it.

YAML lets a key stand twice, and takes the last one; it reads `no`, `on` and `2026-01-01` as something else than what they look like, keys
as well. Whoever wrote such a file means something else than what happens, so these are errors, with their line. A key that comes by a merge
(`<<`) may be there already: that is what merges are for.
Rejected: YAML 1.2 (ruamel.yaml), which is right about `no` but silent about keys that stand twice unless told, and is one more dependency.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml


class BadFile(Exception):
    """The file cannot be used; the message, of one line, names the file and where in it."""


class _Loader(yaml.SafeLoader):
    """Builds plain values, whose mappings have each key once, and text for keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise _At(line, "a key is a list or a mapping of its own: it must be text")
            if key.tag != "tag:yaml.org,2002:str":
                kind = key.tag.rpartition(":")[2]
                raise _At(line, f"the key {key.value!r} is no text for YAML, but a value of its own ({kind}): write it in quotes")
            if key.value in seen:
                raise _At(line, f"the key {key.value!r} stands here and in line {seen[key.value]} already: leave one of them out")
            seen[key.value] = line
        return super().construct_mapping(node, deep)


class _At(Exception):
    """Something is wrong in a line."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(f"line {line}: {what}")


def read_yaml(path: Path) -> Any:
    """The value of the one document in the file. Raises: BadFile."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is no text in UTF-8 (byte {error.start})") from None
    except _At as error:
        raise BadFile(f"{path}, {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise BadFile(f"{path}{f', line {mark.line + 1}' if mark else ''} is no YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that is none, a character that is none
        raise BadFile(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise BadFile(f"{path} is nested too deeply") from None
    if where := next(_nul(found, set()), None):
        raise BadFile(f"{path}: {where}: there is a NUL character, which no program, path or variable can have")
    return found


def lines_of(path: Path, places: Iterable[Sequence[int | str]]) -> list[int]:
    """Of each place in the file, by keys and indices from the top: the line in which its value stands, or what it would stand in.

    What is neither key nor index is passed over: pydantic names a choice's kind, too. 0: the file as a whole.
    """
    try:
        top = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        top = None
    return [_line_of(top, place) for place in places]


def _line_of(node: yaml.Node | None, place: Sequence[int | str]) -> int:
    line = 0
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part], node.value[part]
        else:
            found = None
        if found is not None:
            line, node = found[0].start_mark.line + 1, found[1]
    return line


def _nul(value: Any, inside: set[int], where: str = "") -> Iterator[str]:
    """Where a NUL character is."""
    if isinstance(value, str) and "\0" in value:
        yield where or "the file"
    if not isinstance(value, dict | list) or id(value) in inside:  # an alias may hold itself
        return
    inside.add(id(value))
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        name = f"{where}.{key}" if where else str(key)
        if "\0" in str(key):
            yield name.replace("\0", "\\0")
        yield from _nul(each, inside, name)
