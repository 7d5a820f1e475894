"""What is another between two states, as small as the page needs it: of each model, node, replica and activation the fields that changed.

The page is told the whole state once, and then only this. A thousand nodes tell of their free memory all the time, and what stands on them
seldom changes: so it is fields that are told, and not whole nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from scaler.view.state import State

# By which field things of a list are told apart. All else of a state is told whole when it has changed.
KEYS: Mapping[str, str] = {"models": "name", "nodes": "address", "replicas": "id", "activations": "id"}


def changes(old: State, new: State) -> dict[str, Any]:
    """{"at": …, "set": {list: {key: {field: value}}}, "gone": {list: [key]}}, and by their names other fields of a state that changed.

    Nothing but `at`: nothing has changed. A thing that is new is set with all its fields.
    """
    found: dict[str, Any] = {"at": new.at}
    for field in fields(State):
        before, now = getattr(old, field.name), getattr(new, field.name)
        if field.name == "at" or before == now:
            continue
        if key := KEYS.get(field.name):
            told = {getattr(each, key): each for each in before}
            there = {getattr(each, key): each for each in now}
            known = told.keys() & there.keys()
            found.setdefault("set", {})[field.name] = {
                name: _fields(told[name], each) if name in known else each for name, each in there.items() if told.get(name) != each
            }
            found.setdefault("gone", {})[field.name] = sorted(told.keys() - known)
        else:
            found[field.name] = now
    return found


def _fields(old: Any, new: Any) -> dict[str, Any]:
    return {field.name: getattr(new, field.name) for field in fields(new) if getattr(old, field.name) != getattr(new, field.name)}
