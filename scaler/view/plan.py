"""What `zerowake plan` shows, as JSON: what stands where and why, what is under way or put off, and what would be done at this moment.

It is made by the planner's own look at the world, of which nothing is noted and nothing done.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from aiohttp import web

from scaler.books.demand import Demand
from scaler.fleet.planner import Planner
from scaler.plan.actions import Action, End, Keep, Prefer, Start
from scaler.plan.declared import DeclaredModels
from scaler.plan.estimate import has_room, seconds_to_serve, seconds_to_stage, total_bytes
from scaler.plan.policy import Plan
from scaler.plan.rungs import Rung
from scaler.plan.world import Model, Node, Residency, World

if TYPE_CHECKING:
    from scaler.plan.ahead import Ahead  # which imports numpy, as no command does that asks a running scaler

Barred = Mapping[tuple[str, str], str]  # (node's address, digest) → why it goes no higher there: its namespace's quota
Foretold = Callable[[str], dict[str, Any] | None]
_REFUSED = "its agent could not do it"


class PlanView:
    """Of a running scaler. foretold: the terms of a model's chance (forecast/explained.py); None: it is not known. missing: what the
    scaler has not heard yet, so that its plan is not whole; empty: nothing. weigh: what would be moved ahead of need, of which nothing is.
    """

    def __init__(
        self,
        planner: Planner,
        models: DeclaredModels,
        foretold: Foretold,
        missing: Callable[[], str],
        weigh: Callable[[], Awaitable[Ahead]],
    ) -> None:
        self._planner = planner
        self._models = models
        self._foretold = foretold
        self._missing = missing
        self._weigh = weigh

    @property
    def routes(self) -> list[web.RouteDef]:
        return [web.get("/plan", self._show), web.get("/plan/{model:.+}", self._show_why)]

    async def _show(self, _: web.Request) -> web.Response:
        ahead, names = await self._weigh(), self._names()
        return web.json_response(self.page() | {"would_move_ahead": [_action(action, names) for action in ahead.actions]})

    async def _show_why(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        if (found := self.why(name)) is None:
            return web.json_response({"unknown": name, "known": sorted(self._models)}, status=404)
        ahead, names = await self._weigh(), self._names()
        moves = [_action(action, names) for action in ahead.actions if action.model == name]
        weighed = _weighed(ahead, name, names) if name in ahead.terms else None
        return web.json_response(found | {"ahead": weighed, "would_move_ahead": moves})

    def _names(self) -> dict[str, str]:
        return {node.address: node.called for node in self._planner.world(()).nodes}

    def page(self) -> dict[str, Any]:
        """Of all models."""
        world, plan = self._planner.preview(self._models)
        names, barred = {node.address: node.called for node in world.nodes}, _barred(plan)
        return {
            "missing": self._missing(),
            "models": [self._model(world, barred, model) for model in world.models.values()],
            "under_way": [_action(action, names) for action in world.under_way],
            "put_off": self._put_off(world, names),
            "would_do": [_action(action, names) for action in plan.actions],
        }

    def why(self, name: str) -> dict[str, Any] | None:
        """Every term of one model's plan; None: no model of that name is declared."""
        if name not in self._models:
            return None
        world, plan = self._planner.preview([name])
        model, names = world.models[name], {node.address: node.called for node in world.nodes}
        digests = {there.digest for _, there in world.node_set.having(model.snapshot)}
        return self._model(world, _barred(plan), model) | {
            "missing": self._missing(),
            "demand": _demand(world.demand_of(name)),
            "chance": self._foretold(name),
            "nodes": [self._terms(world, model, node, there) for node, there in world.node_set.having(model.snapshot)],
            "under_way": [_action(action, names) for action in world.being_done.of_model(name)],
            "put_off": [each for each in self._put_off(world, names) if each["digest"] in digests],
            "would_do": [_action(action, names) for action in plan.actions],
            "unmet": plan.unmet.get(name, ""),
            "looks_again_in_seconds": plan.due[name] - world.now if name in plan.due else None,
        }

    def _model(self, world: World, barred: Barred, model: Model) -> dict[str, Any]:
        return {
            "name": model.name,
            "snapshot": str(model.snapshot) if model.snapshot else "",
            "stage": model.stage.name.lower(),
            "pin": model.pin.name.lower() if model.pin > Rung.ABSENT else "",
            "copies": model.copies,
            "replicas_wanted": model.replicas,
            "stands": [
                {
                    "node": node.called,
                    "rung": there.rung.name.lower(),
                    "weights": there.weights_rung.name.lower() if there.weights_bytes else "",
                    "seconds": _finite(seconds_to_serve(node, there)),
                    "why": self._why(world, barred, model, node, there),
                }
                for node, there in world.node_set.having(model.snapshot)
            ],
        }

    def _why(self, world: World, barred: Barred, model: Model, node: Node, there: Residency) -> str:
        """Why it stands on this rung of the node, and no higher one."""
        return next(self._reasons(world, barred, model, node, there))

    def _reasons(self, world: World, barred: Barred, model: Model, node: Node, there: Residency) -> Iterator[str]:
        """The one that decides first."""
        if not node.synced:
            yield "its agent is not heard"
        if why := there.unusable or model.why_not_on(node):
            yield why
        for action in world.being_done.at(node.address):
            if getattr(action, "digest", "") == there.digest and getattr(action, "rung", Rung.ABSENT) > there.rung:
                yield f"on its way: {action.reason}"
        if why := self._planner.why_no_higher(node, there):
            yield why
        if why := barred.get((node.address, there.digest), ""):
            yield why
        if not has_room(node, there):
            yield "its GPUs have no room for it now"
        if there.rung >= model.stage:
            yield f"its owner wishes it so (stage: {model.stage.name.lower()})"
        if there.rung is Rung.DISK and seconds_to_stage(node, there) > model.longest_staging:
            yield f"staging would take {seconds_to_stage(node, there):.3g} s, over the bound of {model.longest_staging:g} s"
        yield "it goes no higher while it is asked for, or replicas of it live"

    def _terms(self, world: World, model: Model, node: Node, there: Residency) -> dict[str, Any]:
        """What the estimate of one node is made of."""
        in_memory = seconds_to_serve(node, _in_memory(there))
        seconds = seconds_to_serve(node, there)
        able = not (math.isinf(seconds) or math.isinf(in_memory))
        return {
            "node": node.called,
            "bytes": total_bytes(there),
            "image_bytes": there.image_bytes,
            "seconds_to_serve": _finite(seconds),
            "seconds_to_stage": seconds_to_stage(node, there),
            "seconds_saved_in_memory": max(seconds - in_memory, 0.0) if able else None,
            "memory_staged_bytes": node.staged_bytes,
            "memory_limit_bytes": node.staged_limit_bytes,
        }

    def _put_off(self, world: World, names: dict[str, str]) -> list[dict[str, Any]]:
        found = []
        for what, moments in (("stage", world.put_off), ("pin", world.pins_put_off)):
            for (address, digest, rung), until in moments.items():
                if until > world.now:
                    there = _snapshot(world, address, digest)
                    why = (self._planner.refusal(address, digest, rung) if what == "stage" else "") or _REFUSED
                    put_off = {"do": what, "snapshot": there, "digest": digest, "node": names.get(address, address)}
                    found.append(put_off | {"rung": rung.name.lower(), "for_seconds": until - world.now, "why": why})
        return sorted(found, key=lambda each: (each["for_seconds"], each["snapshot"], each["node"]))


def _in_memory(there: Residency) -> Residency:
    return replace(there, rung=max(there.rung, Rung.MEMORY))


def _snapshot(world: World, address: str, digest: str) -> str:
    """The name under which any node has it; its own first."""
    for node in sorted(world.nodes, key=lambda each: each.address != address):
        for name, there in node.residencies.items():
            if there.digest == digest:
                return str(name)
    return ""


def _barred(plan: Plan) -> Barred:
    return {(stage.node, stage.digest): why for stage, why in plan.barred.items()}


def _action(action: Action, names: dict[str, str]) -> dict[str, Any]:
    node = "" if isinstance(action, Prefer) else action.node
    rung = getattr(action, "rung", None)
    found: dict[str, Any] = {"do": type(action).__name__.lower(), "model": action.model, "node": names.get(node, node)}
    found |= {"rung": rung.name.lower() if rung else "", "why": action.reason}
    if isinstance(action, Start):
        found["replicas"] = action.replicas
    if isinstance(action, End | Keep):
        found["replica"] = action.replica
    return found


def _weighed(ahead: Ahead, model: str, names: dict[str, str]) -> dict[str, Any]:
    terms = ahead.terms[model]
    return {
        "decision": terms.decision.value,
        "why": terms.why,
        "chance": terms.chance,
        "within_seconds": ahead.within_seconds,
        "node": names.get(terms.node, terms.node),
        "saved_seconds": terms.saved_seconds,
        "bytes": terms.bytes,
        "worth": terms.worth,
        "objective": asdict(ahead.objective),
    }


def _demand(demand: Demand) -> dict[str, Any]:
    told = {"held": demand.held, "in_flight": demand.in_flight, "elsewhere": demand.elsewhere.pending, "replicas": demand.replicas}
    return told | {"unknown": demand.elsewhere.unknown}


def _finite(seconds: float) -> float | None:
    return None if math.isinf(seconds) else seconds
