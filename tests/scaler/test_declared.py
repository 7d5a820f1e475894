"""Models by name and by snapshot, as they are declared, declared otherwise and withdrawn."""

from __future__ import annotations

from scaler.books.snapshot_name import SnapshotName
from scaler.plan.declared import DeclaredModels
from scaler.plan.rungs import Rung
from scaler.plan.world import Model, Stored

ONE, OTHER = SnapshotName("ns", "one"), SnapshotName("ns", "other")


def test_it_is_a_mapping_in_the_order_of_declaration() -> None:
    models = DeclaredModels({"b": Model("b", ONE), "a": Model("a")})
    models["c"] = Model("c")
    models["b"] = Model("b", OTHER)
    assert (list(models), len(models), models["b"].snapshot) == (["b", "a", "c"], 3, OTHER)
    assert models.in_order(["c", "unknown", "b", "c"]) == ["b", "c"]
    models["b"] = models.pop("b")
    assert models.in_order(models) == list(models) == ["a", "c", "b"]


def test_models_of_a_snapshot_and_the_highest_pin_that_one_of_them_wishes() -> None:
    models = DeclaredModels({"a": Model("a", ONE, pin=Rung.DISK), "b": Model("b", ONE, pin=Rung.MEMORY), "cold": Model("cold")})
    assert (list(models.of(ONE)), models.pin(ONE)) == (["a", "b"], Rung.MEMORY)
    models["b"] = Model("b", OTHER, pin=Rung.MEMORY)
    assert (list(models.of(ONE)), models.pin(ONE), list(models.of(OTHER))) == (["a"], Rung.DISK, ["b"])
    del models["a"]
    assert (list(models.of(ONE)), models.pin(ONE), models.pin(None)) == ([], Rung.ABSENT, Rung.ABSENT)


def test_whose_replicas_are_made_here_and_which_may_come_to_another_node() -> None:
    models = DeclaredModels({"here": Model("here", replicas=0), "two": Model("two", ONE, copies=2), "stored": Model("stored", ONE)})
    assert (list(models.made_here), [name for name in models if models.is_spread(name)]) == (["here"], ["two"])
    assert (models.take_new(), models.take_new()) == (["two"], []), "each is told once"
    models["stored"] = Model("stored", ONE, stored=Stored("s3://b", "d", 1))
    models["two"] = Model("two", ONE)
    models["here"] = Model("here")
    models.changed("two")
    assert (list(models.made_here), [name for name in models if models.is_spread(name)], models.take_new()) == ([], ["stored"], ["stored"])
    models.changed("stored")
    assert models.take_new() == ["stored"]
