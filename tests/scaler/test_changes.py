"""What the page is told of another state: no more than what is another, and all of that."""

import json
from dataclasses import fields, replace
from typing import Any

from scaler.page.changes import KEYS, changes
from scaler.view.state import State, as_json, encoded
from tests.worlds import shown_state


def told(old: State, new: State) -> Any:
    return json.loads(encoded(changes(old, new)))


def applied(shown: Any, change: Any) -> Any:
    """As the page does it (state.js): lists by key, and their things field by field."""
    rest = {name: value for name, value in change.items() if name not in ("set", "gone")}
    lists = {name: {each[key]: each for each in shown[name]} for name, key in KEYS.items()}
    for name, gone in change.get("gone", {}).items():
        for key in gone:
            del lists[name][key]
    for name, things in change.get("set", {}).items():
        for key, some in things.items():
            lists[name][key] = lists[name].get(key, {}) | some
    return shown | rest | {name: list(things.values()) for name, things in lists.items()}


def by_key(shown: Any) -> Any:
    return shown | {name: sorted(shown[name], key=lambda each: each[key]) for name, key in KEYS.items()}


def test_of_the_same_state_a_moment_later_nothing_is_told_but_the_moment() -> None:
    state = shown_state.state()
    assert changes(state, replace(state, at=state.at + 1)) == {"at": state.at + 1}


def test_of_what_stays_only_the_fields_that_are_another_are_told() -> None:
    state = shown_state.state(nodes=3, models=2)
    first, *others = state.models
    found = told(state, replace(state, models=(replace(first, held=9), *others)))
    assert found == {"at": state.at, "set": {"models": {first.name: {"held": 9}}}, "gone": {"models": []}}


def test_what_is_new_is_told_whole_and_what_has_gone_by_its_key() -> None:
    state = shown_state.state(nodes=2)
    fresh = shown_state.node("fresh")
    found = told(state, replace(state, nodes=(*state.nodes[1:], fresh)))
    assert found["set"]["nodes"] == {fresh.address: as_json(fresh)}
    assert found["gone"]["nodes"] == [state.nodes[0].address]


def test_whoever_applies_all_changes_has_the_state() -> None:
    first = shown_state.state(nodes=21, models=6)
    second = shown_state.moved(first, 2.0)
    third = replace(
        second,
        missing="nothing was heard of its peers",
        models=second.models[:-1],
        replicas=(),
        activations=(shown_state.start("new", "model-0", "cold", second.at), *second.activations[:-1]),
        plan=replace(second.plan, under_way=()),
    )
    shown = as_json(first)
    for old, new in ((first, second), (second, third)):
        shown = applied(shown, told(old, new))
    assert by_key(shown) == by_key(as_json(third))


def test_every_list_of_things_is_told_by_its_keys() -> None:
    state = shown_state.state()
    lists = {field.name for field in fields(State) if isinstance(getattr(state, field.name), tuple)}
    assert lists == KEYS.keys()
    for name, key in KEYS.items():
        things = getattr(state, name)
        assert len({getattr(each, key) for each in things}) == len(things)
