"""Which models a node's news concern: none is left out for which there would be something to do."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.concern import Concern
from scaler.plan.actions import Stage
from scaler.plan.copies import is_short
from scaler.plan.declared import DeclaredModels
from scaler.plan.policy import decide
from scaler.plan.remote import is_cramped
from scaler.plan.rungs import Rung
from scaler.plan.scheduling import ZONE, Standing
from scaler.plan.world import Gpu, Model, Node, NodeSet, Replica, Residency, Stored, World

NAMES = [SnapshotName("ns", f"s{number}") for number in range(4)]
HAS = Residency("d", Rung.DISK, 1000, gpu_bytes=(10 << 30,))
FULL, FREE = (Gpu("g", 80 << 30, 1 << 30),), (Gpu("g", 80 << 30, 70 << 30),)


class Many:
    """Models and nodes that change by chance, and what was concerned before each news cost less than a look at all models."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        models = [Model(f"m{number}", self.chance.choice(NAMES), copies=self.chance.choice([1, 2, 3])) for number in range(6)]
        stored = Stored("s3://b", "d", 1000, gpu_bytes=(10 << 30,))
        self.models = DeclaredModels({each.name: replace(each, stored=self.chance.choice([None, stored])) for each in models})
        self.nodes = {f"n{number}": Node(f"n{number}", f"n{number}", peer_address=f"n{number}:1", gpus=FREE) for number in range(4)}
        self.concern = Concern(self.models)
        self.cramped: set[str] = set()
        self.short: set[str] = set()

    def lasting(self, nodes: NodeSet, name: str) -> tuple[bool, bool]:
        return is_cramped(nodes, self.models[name]), is_short(nodes, self.models[name])

    def decide(self, names: set[str]) -> None:
        """What is staged is there at once."""
        nodes = NodeSet(self.nodes.values())
        for name in names:
            cramped, short = self.lasting(nodes, name)
            (self.cramped.add if cramped else self.cramped.discard)(name)
            (self.short.add if short else self.short.discard)(name)
            self.concern.decided(self.models[name], nodes, ())

    def changes(self) -> str:
        """Address of the node that has news."""
        address = self.chance.choice(list(self.nodes))
        node = self.nodes[address]
        name, snapshot = self.chance.choice(list(self.models)), self.chance.choice(NAMES)
        kind = self.chance.choice(["comes", "goes", "comes", "replica", "ends", "synced", "damaged", "room", "cordon", "zone", "declared"])
        there = {each: how for each, how in node.residencies.items() if each != snapshot}
        if kind in ("comes", "damaged"):
            node = replace(node, residencies={**there, snapshot: replace(HAS, unusable="damaged" if kind == "damaged" else "")})
        elif kind == "goes":
            node = replace(node, residencies=there)
        elif kind in ("replica", "ends"):
            node = replace(node, replicas={"r": Replica("r", name)} if kind == "replica" else {})
        elif kind == "synced":
            node = replace(node, synced=not node.synced)
        elif kind == "room":  # which is no news: those of another node are
            self.nodes[address] = replace(node, gpus=self.chance.choice([FULL, FREE]))
            return self.chance.choice(list(self.nodes))
        elif kind == "cordon":
            node = replace(node, standing=replace(node.standing or Standing(), cordoned=not (node.standing and node.standing.cordoned)))
        elif kind == "zone":
            zone = {ZONE: self.chance.choice("ab")}
            node = replace(node, standing=replace(node.standing or Standing(), labels=zone))
        else:
            self.models[name] = replace(self.models[name], copies=self.chance.choice([1, 2, 3]))
        self.nodes[address] = node
        return address

    def hears(self) -> tuple[set[str], set[str]]:
        """The models that the next news concern, and those that would be looked at if all were that may be moved to another node."""
        node = self.nodes[self.changes()]
        open_before = self.concern.take_open()
        found = self.concern.of(node, self.nodes.values()) | open_before | self.cramped | self.short
        served = {replica.model for replica in node.replicas.values()}
        before = {
            name
            for name, model in self.models.items()
            if name in served or model.snapshot in node.residencies or self.models.is_spread(name) or name in self.cramped | self.short
        }
        return found, before


@pytest.mark.parametrize("seed", range(40))
def test_for_those_left_out_nothing_has_changed(seed: int) -> None:
    many = Many(seed)
    for _ in range(100):
        found, before = many.hears()
        nodes = NodeSet(many.nodes.values())
        many.decide(found)
        for name in before - found:
            assert many.lasting(nodes, name) == (name in many.cramped, name in many.short)
            plan = decide(World(0.0, {name: many.models[name]}, nodes))
            assert not [each for each in plan.actions if isinstance(each, Stage) and each.rung is Rung.DISK] and not plan.due


def test_a_model_is_concerned_when_a_node_that_has_it_loses_its_gpu_to_others_or_has_it_back() -> None:
    models = DeclaredModels({"m": Model("m", NAMES[0], copies=2), "other": Model("other", NAMES[1], copies=2)})
    there = Node("a", "a", True, peer_address="x:1", gpus=FREE, residencies={NAMES[0]: HAS})
    concern = Concern(models)
    assert concern.of_room(there) == set(), "nobody knows how it was"
    less = (replace(FREE[0], free_bytes=FREE[0].free_bytes - (1 << 30)),)
    assert concern.of_room(replace(there, gpus=less)) == set(), "there is room all the same"
    assert concern.of_room(replace(there, gpus=FULL)) == {"m"}
    assert concern.of_room(replace(there, gpus=FULL)) == set(), "it was told"
    assert concern.of_room(there) == {"m"}


def test_a_model_that_is_where_it_is_to_be_is_no_concern_of_another_node() -> None:
    models = DeclaredModels({"m": Model("m", NAMES[0], copies=2)})
    nodes = NodeSet(
        [Node(each, each, True, peer_address="x:1", gpus=FREE, residencies={NAMES[0]: HAS}) for each in "ab"] + [Node("c", "c", True)]
    )
    concern = Concern(models)
    assert concern.take_open() == {"m"}, "it is new"
    concern.decided(models["m"], nodes, ())
    assert (concern.take_open(), concern.of(nodes[2], nodes), concern.of(nodes[0], nodes)) == (set(), set(), {"m"})
    lost = replace(nodes[0], residencies={})
    assert concern.of(lost, nodes) == {"m"}, "it had a copy"
    concern.decided(models["m"], NodeSet([lost, *nodes[1:]]), ())
    assert concern.take_open() == {"m"}, "any other node may be the one now"
    concern.decided(models["m"], nodes, ("c",))
    assert concern.take_open() == {"m"}, "a pod of it waits"
