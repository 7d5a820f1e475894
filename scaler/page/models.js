// The table of models.

import { Children, Opener, Shortened, cell, facts, heading, make, setData, setHidden, setText } from "./dom.js";
import { bytes, next, plural, rate, seconds } from "./text.js";

// The first are those that somebody should look at.
const STANDINGS = ["in trouble", "waking", "serving", "asleep"];
const FIRST = 15;

export function standing(model) {
  if (model.failure || model.unusable) return "in trouble";
  if (model.replicas.ready) return "serving";
  return model.held ? "waking" : "asleep";
}

export class Models {
  constructor() {
    this.rows = new Children(document.querySelector("#models-table tbody"), (model) => new Row(model, this));
    this.replicas = new Map();
    this.only = null;
    this.shortened = new Shortened(document.getElementById("models-more"), FIRST, "models", () => this.show(this.state, this.filter));
    this.buttons = new Map([null, ...STANDINGS].map((only) => [only, this.choice(only)]));
    document.getElementById("standings").append(...this.buttons.values());
  }

  choice(only) {
    const choose = () => {
      this.only = only;
      this.show(this.state, this.filter);
    };
    return make("button", { type: "button", on: { click: choose }, class: only && `is-${only.replace(" ", "-")}` });
  }

  show(state, filter) {
    this.state = state;
    this.filter = filter;
    if (state.changed.has("replicas")) this.replicas = byModel(state.replicas);
    const named = state.ordered("models").filter(({ name }) => filter(name));
    const groups = new Map(STANDINGS.map((each) => [each, []]));
    for (const model of named) groups.get(standing(model)).push(model);
    for (const [only, button] of this.buttons) {
      setText(button, `${only ?? "all"} ${(only ? groups.get(only) : named).length}`);
      button.setAttribute("aria-pressed", String(only === this.only));
    }
    const shown = this.only ? groups.get(this.only) : [...groups.values()].flat();
    this.rows.show(this.shortened.of(shown), ({ name }) => name);
    if (state.changed.has("replicas")) for (const row of this.rows.known.values()) row.fill();
    setText(document.getElementById("models-count"), shown.length === state.models.size ? `${shown.length}` : `${shown.length} of ${state.models.size}`);
    const empty = document.getElementById("models-empty");
    setHidden(empty, shown.length > 0);
    setText(empty, state.models.size ? "No model is like that now." : "No model is declared yet.");
  }
}

class Row {
  constructor(model, models) {
    this.models = models;
    this.badge = make("span", { class: "badge" });
    this.opener = new Opener(model.name, () => this.fill());
    this.replicas = cell("Replicas", { class: "number" });
    this.queue = cell("Queue", { class: "number" });
    this.flight = cell("In flight", { class: "number" });
    this.rate = cell("Rate", { class: "number" });
    this.next = cell("Next likely");
    this.rung = cell("Waits in");
    this.serves = cell("Serves in", { class: "number" });
    this.notes = make("ul", { class: "notes" });
    this.facts = make("div");
    this.more = cell("", { class: "more" }, this.notes, this.facts);
    const head = heading({}, this.opener.button, this.badge);
    const numbers = [this.replicas, this.queue, this.flight, this.rate, this.next, this.rung, this.serves];
    this.element = make("tr", { role: "row" }, head, ...numbers, this.more);
  }

  update(model) {
    const { replicas } = model;
    const is = standing(model);
    setText(this.badge, is);
    setData(this.badge, "standing", is);
    const of = replicas.wanted ?? replicas.limit;
    setText(this.replicas, [`${replicas.ready}${of === null ? "" : ` / ${of}`}`, replicas.sleeping && `${replicas.sleeping} asleep`, replicas.draining && `${replicas.draining} draining`].filter(Boolean).join(", "));
    setText(this.queue, model.elsewhere ? `${model.held} + ${model.elsewhere}` : `${model.held}`);
    setData(this.queue, "loud", model.held ? "yes" : "no");
    setText(this.flight, `${model.in_flight}`);
    setText(this.rate, rate(model.rate));
    setText(this.next, next(model.next_likely_seconds));
    setText(this.rung, model.rung ?? (model.snapshot ? "nowhere yet" : "no snapshot"));
    setData(this.rung, "rung", model.rung ?? "");
    setText(this.serves, seconds(model.seconds_to_serve));
    const faults = model.sources.filter(({ fault }) => fault).map(({ name, fault }) => `source ${name}: ${fault}`);
    const notes = [model.failure && `last start failed: ${model.failure}`, model.unusable && `cannot be restored: ${model.unusable}`, model.refused, ...faults].filter(Boolean);
    setHidden(this.notes, notes.length === 0);
    if (notes.join("\n") !== [...this.notes.children].map((each) => each.textContent).join("\n")) this.notes.replaceChildren(...notes.map((note) => make("li", {}, note)));
    this.fill();
  }

  /** Only what is open is kept up to date. */
  fill() {
    setHidden(this.facts, !this.opener.open);
    setHidden(this.more, this.notes.hidden && !this.opener.open);
    if (!this.opener.open) return;
    const model = this.item;
    const replicas = this.models.replicas.get(model.name) ?? [];
    const pairs = [
      ["Snapshot", model.snapshot ? `${model.snapshot}, on ${plural(model.copies, "node")} of ${model.copies_wanted} wanted` : "none: it is started cold"],
      ["Is to wait in", model.stage + (model.pinned ? `, pinned in ${model.pinned}` : "")],
      ["Queue", `${model.held} of ${model.held_limit} requests, ${bytes(model.held_bytes)} here`],
      ...model.sources.map((source) => [`Source ${source.name}`, `${source.of}: ${source.pending === null ? "unknown" : `${source.pending} pending, ${plural(source.replicas, "replica")}`}`]),
      ...replicas.map((each) => [`Replica ${each.id}`, [each.state, each.origin, each.node && `on ${each.node}`, `${each.in_flight} in flight`, each.detail].filter(Boolean).join(", ")]),
    ];
    this.facts.replaceChildren(facts(pairs));
  }
}

function byModel(replicas) {
  const found = new Map();
  for (const each of replicas.values()) {
    if (!found.has(each.model)) found.set(each.model, []);
    found.get(each.model).push(each);
  }
  return found;
}
