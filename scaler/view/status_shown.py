"""`zerowake status` as tables, and as one line per change, from the state (state.py)."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from scaler.view.state import Activation, Gpu, Model, Node, State
from zerowake_shared import tables

_SHOWN_ACTIVATIONS = 10


def view(state: State) -> Group:
    """All of it, for a person."""
    shown: list[RenderableType] = [Text(f"not whole: {state.missing}")] if state.missing else []
    parts = [
        _models(state),
        _asked_for(state),
        _nodes(state),
        _moves(state),
        _sources(state),
        _replicas(state),
        _activations(state),
    ]
    for number, table in enumerate(part for part in parts if part.row_count or part in (parts[0], parts[2])):
        shown += [Text(), table] if number else [table]
    return Group(*shown)


def changes(before: State | None, state: State) -> Iterator[str]:
    """One line for each thing that is otherwise than before, with the time; before: None: for each thing that there is, but for what has
    ended."""
    old, new = facts(before) if before else {}, facts(state)
    at = _time(state.at)
    if before is None:
        new = {what: how for what, how in new.items() if not what.startswith("activation ")}
    for what, how in new.items():
        if old.get(what) != how:
            yield f"{at} {what}: {how}"
    for what in old:
        if what not in new and not what.startswith("activation "):
            yield f"{at} {what}: gone"


def facts(state: State) -> dict[str, str]:
    """What is said of each thing, without what is otherwise at each look."""
    rungs = _rungs(state)
    found = {}
    for model in state.models:
        note = _note(model)
        counts = f"{model.replicas.ready} ready, {model.held} held, {model.in_flight} in flight"
        where = f", {rungs[model.snapshot]}" if model.snapshot in rungs else ""
        found[f"model {model.name}"] = f"{counts}{where}{f'; {note}' if note else ''}"
    for node in state.nodes:
        found[f"node {node.name}"] = f"{node.presence}{', cordoned' if node.cordoned else ''}"
        for move in node.moves:
            found[f"{move.snapshot} on {node.name}"] = f"on its way to {move.to}"
    for replica in state.replicas:
        made = f", {replica.origin}" if replica.origin else ""
        found[f"replica {replica.id} of {replica.model}"] = f"{replica.state}{made}{f' on {replica.node}' if replica.node else ''}"
    for each in state.activations:
        took = f" in {each.seconds:.3f} s" if each.outcome != "open" else ""
        why = each.reason or (f"{each.origin}: {_phases(each)}" if each.origin else _phases(each))
        found[f"activation {each.id} of {each.model}"] = each.outcome + took + (f" ({why})" if took else "")
    return found


def _models(state: State) -> Table:
    models = tables.table("MODEL", "SNAPSHOT", "RUNG", "WANTED", "READY", "HELD", "IN FLIGHT", "NOTE")
    rungs = _rungs(state)
    for each in state.models:
        rung = rungs.get(each.snapshot, "absent") if each.snapshot else "-"
        wanted = "-" if each.replicas.wanted is None else str(each.replicas.wanted)
        numbers = (str(number) for number in (each.replicas.ready, each.held, each.in_flight))
        models.add_row(each.name, each.snapshot or "-", rung, wanted, *numbers, _note(each))
    return models


def _rungs(state: State) -> dict[str, str]:
    """Where each snapshot stands, and where it is pinned; on several nodes: on how many of them."""
    found: dict[str, Counter[str]] = {}
    pinned: dict[str, Counter[str]] = {}
    for node in state.nodes:
        for copy in node.copies:
            found.setdefault(copy.snapshot, Counter())[copy.rung] += 1
            if copy.pinned:
                pinned.setdefault(copy.snapshot, Counter())[copy.pinned] += 1

    def told(counted: Counter[str]) -> str:
        return ", ".join(rung if len(state.nodes) == 1 else f"{rung} {nodes}" for rung, nodes in counted.most_common())

    return {
        snapshot: told(counted) + (f" (pinned: {told(pinned[snapshot])})" if snapshot in pinned else "")
        for snapshot, counted in found.items()
    }


def _note(model: Model) -> str:
    return model.failure or model.unusable or model.refused or ""


def _asked_for(state: State) -> Table:
    """Past the gateway."""
    asked = tables.table("ASKED FOR BY", "MODEL", "PENDING", "REPLICAS", "AGE", "NOTE")
    for model in state.models:
        for each in model.sources:
            known = each.pending is not None
            counts = (str(each.pending), str(each.replicas or "-")) if known else ("unknown", "unknown")
            age = "-" if each.age_seconds is None else f"{each.age_seconds:.0f} s"
            asked.add_row(f"{each.name}: {each.of}", model.name, *counts, age, each.fault)
    return asked


def _nodes(state: State) -> Table:
    nodes = tables.table("NODE", "MEMORY FREE", "IMAGES", "GPU", "GPU FREE", "GPUMEM", "PARKED", "OTHERS")
    for node in state.nodes:
        memory = node.memory
        budget = f" of {_gib(memory.staged_limit_bytes)}" if memory.staged_limit_bytes is not None else ""
        head = (
            node.name + _standing(node),
            f"{_gib(memory.free_bytes)} of {_gib(memory.total_bytes)}",
            _gib(memory.staged_bytes) + budget,
        )
        gpus: tuple[Gpu | None, ...] = node.gpus or (None,)
        for number, gpu in enumerate(gpus):
            nodes.add_row(*(("", "", "") if number else head), *(_gpu(gpu) if gpu else ()))
    return nodes


def _standing(node: Node) -> str:
    said = [*([node.presence.value] if node.presence != "heard" else []), *(["cordoned"] if node.cordoned else [])]
    return f" ({', '.join(said)})" if said else ""


def _gpu(gpu: Gpu) -> tuple[str, ...]:
    return (gpu.model or gpu.uuid, *(_gib(size) for size in (gpu.unused_bytes, gpu.pool_bytes, gpu.parked_bytes, gpu.others_bytes)))


def _moves(state: State) -> Table:
    moving = tables.table("ON ITS WAY", "NODE", "TO", "DONE")
    for node in state.nodes:
        for way in node.moves:
            moving.add_row(way.snapshot, node.name, way.to, f"{_gib(way.done_bytes)} of {_gib(way.total_bytes)}")
    return moving


def _sources(state: State) -> Table:
    sources = tables.table("SOURCE", "NODE", "RATE", "NOTE")
    for node in state.nodes:
        for each in node.sources:
            sources.add_row(each.name, node.name, f"{each.rate / 1e6:.0f} MB/s" if each.rate else "-", each.fault)
    return sources


def _replicas(state: State) -> Table:
    replicas = tables.table("REPLICA", "NODE", "STATE", "ORIGIN", "IN FLIGHT", "NOTE")
    for each in state.replicas:
        stands = f"{each.state}{f' ({each.sleeps})' if each.sleeps else ''}"
        replicas.add_row(each.id, each.node or "-", stands, each.origin or "-", str(each.in_flight), each.detail)
    return replicas


def _activations(state: State) -> Table:
    last = tables.table("ACTIVATION", "MODEL", "AT", "OUTCOME", "ORIGIN", "SECONDS", "PHASES (ms)")
    for each in state.activations[:_SHOWN_ACTIVATIONS]:
        how = each.outcome, each.origin or "-"
        last.add_row(each.id, each.model, _time(each.began), *how, f"{each.seconds:.3f}", _phases(each) or each.reason)
    return last


def _phases(activation: Activation) -> str:
    parts = [(phase.name, phase.seconds) for phase in activation.phases]
    if activation.unaccounted_seconds is not None and parts:
        parts.append(("unaccounted", activation.unaccounted_seconds))
    return " ".join(f"{name} {seconds * 1000:.0f}" for name, seconds in parts)


def _time(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).astimezone().strftime("%H:%M:%S")


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.1f} GiB"
