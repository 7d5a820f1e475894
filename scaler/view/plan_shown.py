"""`zerowake plan` as tables, from the JSON of a running scaler (plan.py)."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from zerowake_shared import tables


def show(console: Console, found: Any, *, dry_run: bool) -> None:
    """What stands where and why, what is under way and put off; dry_run: what would be done at this moment, and no more than that."""
    _say_what_is_missing(console, found)
    if dry_run:
        _actions(console, "WOULD DO", found["would_do"], "nothing would be done now")
        _actions(console, "AHEAD OF NEED", found["would_move_ahead"], "nothing would be moved ahead of need")
        return
    stands = tables.table("MODEL", "SNAPSHOT", "WAITS", "NODE", "RUNG", "SECONDS", "WHY")
    for model in found["models"]:
        for number, there in enumerate(model["stands"] or [None]):
            head = (model["name"], model["snapshot"] or "-", model["stage"]) if not number else ("", "", "")
            stands.add_row(*head, *_place(there, model))
    console.print(stands)
    console.print()
    _actions(console, "UNDER WAY", found["under_way"], "nothing is under way")
    _put_off(console, found["put_off"])


def show_why(console: Console, found: Any) -> None:
    """Every term of one model's plan."""
    _say_what_is_missing(console, found)
    asked = found["demand"]
    demand = f"{asked['held']} held, {asked['in_flight']} in flight, {asked['elsewhere']} elsewhere, {asked['replicas']} replicas"
    rows = [
        ("model", found["name"]),
        ("snapshot", found["snapshot"] or "none: it is started cold"),
        ("waits", f"stage {found['stage']}, {found['copies']} copies{', pinned: ' + found['pin'] if found['pin'] else ''}"),
        ("demand", demand + (f"; unknown: {asked['unknown']}" if asked["unknown"] else "")),
        *_chance(found["chance"]),
        *_ahead(found["ahead"]),
    ]
    if found["replicas_wanted"] is not None:
        rows.insert(4, ("replicas wanted", f"{found['replicas_wanted']}{'; ' + found['unmet'] if found['unmet'] else ''}"))
    if found["looks_again_in_seconds"] is not None:
        rows.append(("looks again", f"in {found['looks_again_in_seconds']:.0f} s"))
    for name, text in rows:
        console.print(f"{name + ':':17}{text}", soft_wrap=True)
    console.print()
    nodes = tables.table("NODE", "RUNG", "BYTES", "SECONDS", "TO STAGE", "SAVED IN MEMORY", "IMAGES THERE", "WHY")
    for terms, there in zip(found["nodes"], found["stands"], strict=True):
        images = f"{_size(terms['memory_staged_bytes'])} of {_size(terms['memory_limit_bytes'])}"
        seconds = (_seconds(terms[key]) for key in ("seconds_to_serve", "seconds_to_stage", "seconds_saved_in_memory"))
        nodes.add_row(terms["node"], there["rung"], _size(terms["bytes"]), *seconds, images, there["why"])
    if nodes.row_count:
        console.print(nodes)
    else:
        console.print("no node has its snapshot" if found["snapshot"] else "it has no snapshot, so nothing is staged for it")
    console.print()
    _actions(console, "UNDER WAY", found["under_way"], "nothing is under way")
    _actions(console, "WOULD DO", found["would_do"], "nothing would be done now")
    _put_off(console, found["put_off"])


def _chance(terms: Any) -> list[tuple[str, str]]:
    if terms is None:
        return [("chance", "the forecast does not know it")]
    if terms["chance"] >= 1.0:
        return [("chance", "it is asked for now")]
    begin, end = terms["as_long_seconds"]
    length = f"{begin:.0f} to {end:.0f} s" if end is not None else f"{begin:.0f} s and more"
    seasons = [f"{name} {factor:.2f} ({'counts' if counts else 'does not count'})" for name, (factor, counts) in terms["seasons"].items()]
    return [
        ("chance", f"{terms['chance']:.1%} within {terms['within_seconds']:.0f} s: idle for {terms['idle_seconds']:.0f} s"),
        ("  own", f"{terms['own_ends']:g} idle times ended at {length}: {_hourly(terms['own_per_second'])}"),
        ("  pooled", f"of all models: {_hourly(terms['pooled_per_second'])}"),
        ("  together", f"{_hourly(terms['per_second'])} now, with the hour and the weekday where they count"),
        ("  factors", ", ".join(seasons)),
        ("  credit", f"{terms['credit_nats']:+.1f} nats against its mean rate; of all models {terms['all_credit_nats']:+.1f}"),
    ]


def _ahead(terms: Any) -> list[tuple[str, str]]:
    if terms is None:
        return []
    rows = [("ahead of need", f"{terms['decision']}: {terms['why']}")]
    if terms["bytes"]:
        chance = f"{terms['chance']:.1%} within {terms['within_seconds']:.0f} s"
        rows.append(
            ("  worth", f"{terms['worth'] * (1 << 30):.3g} a GiB: {chance} × {_gain(terms)} ÷ {_size(terms['bytes'])}, on {terms['node']}")
        )
    return rows


def _gain(terms: Any) -> str:
    """What a request's finding its bytes is good for, as the objective has it."""
    saved = f"{_seconds(terms['saved_seconds'])} saved"
    parts = {"hits": "a hit", "mean": saved, "tail": f"({saved})²"}
    counts = [(terms["objective"][name], what) for name, what in parts.items() if terms["objective"][name]]
    return f"({' + '.join(what if weight == 1 else f'{weight:g} × {what}' for weight, what in counts)})"


def _hourly(per_second: float) -> str:
    return f"{per_second * 3600:.3g} requests an hour"


def _place(there: Any, model: Any) -> tuple[str, str, str, str]:
    if there is None:
        return "-", "-", "-", "no node has it" if model["snapshot"] else "it has no snapshot: it is started cold"
    rung = there["rung"] + (f", weights {there['weights']}" if there["weights"] else "")
    return there["node"], rung, _seconds(there["seconds"]), there["why"]


def _actions(console: Console, heading: str, actions: Any, none: str) -> None:
    if not actions:
        console.print(none)
        return
    shown = tables.table(heading, "MODEL", "NODE", "TO", "WHY")
    for each in actions:
        to = each["rung"] or each.get("replica") or str(each.get("replicas", ""))
        shown.add_row(each["do"], each["model"], each["node"] or "-", to or "-", each["why"])
    console.print(shown)


def _put_off(console: Console, put_off: Any) -> None:
    if put_off:
        shown = tables.table("PUT OFF", "SNAPSHOT", "NODE", "TO", "FOR", "WHY")
        for each in put_off:
            shown.add_row(each["do"], each["snapshot"] or "-", each["node"], each["rung"], f"{each['for_seconds']:.0f} s", each["why"])
        console.print()
        console.print(shown)


def _say_what_is_missing(console: Console, found: Any) -> None:
    if found["missing"]:
        console.print(f"This scaler does not know all of it: {found['missing']}. Ask again, or another replica.", soft_wrap=True)
        console.print()


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.3g} s"


def _size(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:.2f} GiB"
