// Starts from zero: each as a bar of its phases, and opened as a waterfall; and of one model those restored beside those cold.

import { Children, Shortened, cell, heading, make, setData, setHidden, setStyle, setText } from "./dom.js";
import { clock, plural, seconds } from "./text.js";

const FIRST = 10;
const COMPARED = 6;
const UNACCOUNTED = "unaccounted";
const RESTORED = ["restored", "standby", "parked"];

export class Starts {
  constructor() {
    this.list = new Children(document.getElementById("starts-list"), (start) => new Start(start, this));
    this.compared = new Children(document.querySelector("#compared-table tbody"), () => new Comparison());
    this.shortened = new Shortened(document.getElementById("starts-more"), FIRST, "starts", () => this.show(this.state, this.filter));
    this.chosen = false; // by a person: then nothing opens by itself any more
  }

  show(state, filter) {
    this.state = state;
    this.filter = filter;
    const starts = [...state.activations.values()].filter((each) => filter(each.model)).sort((a, b) => (b.outcome === "open") - (a.outcome === "open") || b.began - a.began);
    const shown = this.shortened.of(starts);
    this.list.show(shown, ({ id }) => id);
    if (!this.chosen && shown.length) for (const each of this.list.known.values()) each.open(each.item === shown[0]);
    this.compared.show(comparisons(starts).slice(0, COMPARED), ({ model }) => model);
    setHidden(document.getElementById("compared"), this.compared.known.size === 0);
    setText(document.getElementById("starts-count"), starts.length ? `the last ${starts.length}` : "");
    const empty = document.getElementById("starts-empty");
    setHidden(empty, starts.length > 0);
    setText(empty, "No model was started from zero since this scaler began.");
  }
}

/** Of each model that has both: the latest start that was restored, in whatever way, and the latest one that was cold. */
function comparisons(starts) {
  const found = new Map();
  for (const start of starts) {
    const kind = start.origin === "cold" ? "cold" : RESTORED.includes(start.origin) ? "restored" : null;
    if (start.outcome !== "served" || !kind) continue;
    const pair = found.get(start.model) ?? { model: start.model, restored: null, cold: null };
    pair[kind] ??= start;
    found.set(start.model, pair);
  }
  return [...found.values()].filter(({ restored, cold }) => restored && cold);
}

class Comparison {
  constructor() {
    this.name = make("span", { class: "name" });
    this.bars = ["Restored", "Cold"].map((label) => ({ bar: make("div", { class: "phases", "aria-hidden": "true" }), text: make("span"), label }));
    this.sooner = cell("Sooner", { class: "number" });
    const cells = this.bars.map(({ bar, text, label }) => cell(label, { class: "compared" }, make("p", {}, text), make("div", { class: "track" }, bar)));
    this.element = make("tr", { role: "row" }, heading({}, this.name), ...cells, this.sooner);
  }

  update({ model, restored, cold }) {
    setText(this.name, model);
    const longest = Math.max(restored.seconds, cold.seconds);
    [restored, cold].forEach((start, at) => {
      const { bar, text } = this.bars[at];
      setText(text, `${start.origin} ${seconds(start.seconds)}`);
      drawPhases(bar, start, longest);
    });
    const times = cold.seconds / restored.seconds;
    setText(this.sooner, times >= 1.05 ? `${times < 9.95 ? times.toFixed(1) : Math.round(times)} × sooner` : "–");
  }
}

/** The parts of it, from the beginning to the end; what no phase accounts for is one of them. */
function parts(start) {
  const found = start.phases.map((phase) => ({ name: phase.name, begins: phase.begins_seconds, length: phase.seconds }));
  if (start.unaccounted_seconds) found.push({ name: UNACCOUNTED, begins: start.seconds - start.unaccounted_seconds, length: start.unaccounted_seconds });
  return found;
}

/** One bar. Image and weights move at once: the shorter of the two lies in the lower half of the longer one. */
function drawPhases(bar, start, longest) {
  setStyle(bar, "inline-size", `${((start.seconds / longest) * 100).toFixed(2)}%`);
  const all = parts(start);
  all.forEach((phase, at) => {
    const piece = bar.children[at] ?? bar.appendChild(make("i"));
    setData(piece, "phase", phase.name);
    setStyle(piece, "inset-inline-start", `${((phase.begins / start.seconds) * 100).toFixed(2)}%`);
    setStyle(piece, "inline-size", `${((phase.length / start.seconds) * 100).toFixed(2)}%`);
    piece.title = `${phase.name.replace("_", " ")} ${seconds(phase.length)}`;
  });
  while (bar.children.length > all.length) bar.lastElementChild.remove();
}

class Start {
  constructor(start, starts) {
    this.starts = starts;
    this.origin = make("span", { class: "badge" });
    this.total = make("strong");
    this.when = make("time");
    this.bar = make("div", { class: "phases" });
    this.summary = make(
      "summary",
      { on: { click: () => (starts.chosen = true) } },
      make("span", { class: "name" }, start.model),
      this.origin,
      this.total,
      this.when,
      make("span", { class: "track", "aria-hidden": "true" }, this.bar),
    );
    this.body = make("tbody");
    this.why = make("p", { class: "why" });
    const head = ["Phase", "From the request to the first byte", "Took"].map((text) => make("th", { scope: "col" }, text));
    const table = make("table", { class: "waterfall", "aria-label": `Phases of the start of ${start.model}` }, make("thead", { class: "unseen" }, make("tr", {}, ...head)), this.body);
    this.details = make("details", { on: { toggle: () => this.fill() } }, this.summary, this.why, table);
    this.element = make("li", {}, this.details);
  }

  update(start) {
    setText(this.origin, start.outcome === "open" ? "waking" : (start.origin ?? start.outcome));
    setData(this.origin, "origin", this.origin.textContent);
    setText(this.total, seconds(start.seconds));
    setText(this.when, clock(start.began));
    this.when.dateTime = new Date(start.began * 1000).toISOString();
    setText(this.why, [start.outcome === "abandoned" && "abandoned", start.reason, `activation ${start.id}`].filter(Boolean).join(" · "));
    drawPhases(this.bar, start, start.seconds || 1);
    this.fill();
  }

  open(open) {
    if (this.details.open !== open) this.details.open = open;
  }

  fill() {
    if (!this.details.open) return;
    const start = this.item;
    const whole = start.seconds || 1;
    const rows = parts(start).map((phase) => {
      const piece = make("i", { "data-phase": phase.name, style: { "inset-inline-start": `${(phase.begins / whole) * 100}%`, "inline-size": `${(phase.length / whole) * 100}%` } });
      return make("tr", {}, make("th", { scope: "row" }, phase.name.replace("_", " ")), make("td", { class: "lane" }, make("div", { class: "track", "aria-hidden": "true" }, piece), make("span", { class: "unseen" }, `begins after ${seconds(phase.begins)}`)), make("td", { class: "number" }, seconds(phase.length)));
    });
    if (!rows.length) rows.push(make("tr", {}, make("td", { colspan: "3" }, start.outcome === "open" ? "no phase has ended yet" : "no phase was measured")));
    this.body.replaceChildren(...rows);
  }
}

export function startsInShort(state) {
  const served = [...state.activations.values()].filter(({ outcome, origin }) => outcome === "served" && RESTORED.includes(origin));
  if (!served.length) return null;
  const lengths = served.map((each) => each.seconds).sort((a, b) => a - b);
  return { text: seconds(lengths[Math.floor(lengths.length / 2)]), of: plural(served.length, "start") };
}
