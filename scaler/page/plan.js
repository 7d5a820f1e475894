// What is being done and what is put off, each with its reason.

import { Children, Shortened, cell, make, setHidden, setText } from "./dom.js";
import { plural, seconds, snapshot } from "./text.js";

const FIRST = 12;

export class Plan {
  constructor() {
    this.rows = new Children(document.querySelector("#plan-table tbody"), () => new Row());
    this.shortened = new Shortened(document.getElementById("plan-more"), FIRST, "steps", () => this.show(this.state, this.filter));
  }

  show(state, filter) {
    this.state = state;
    this.filter = filter;
    const steps = [...state.plan.under_way, ...state.plan.put_off].filter((step) => filter(step.model ?? "", step.snapshot ?? "", step.node ?? ""));
    // Replicas that are started at once for the same reason are one line.
    const alike = new Map();
    for (const step of steps) {
      const key = JSON.stringify([step.do, step.model, step.snapshot, step.node, step.rung, step.replica, step.why, step.for_seconds === null]);
      alike.set(key, { ...step, key, times: (alike.get(key)?.times ?? 0) + 1 });
    }
    this.rows.show(this.shortened.of([...alike.values()]), ({ key }) => key);
    const { under_way: now, put_off: later } = state.plan;
    setText(document.getElementById("plan-count"), steps.length ? `${now.length} under way, ${later.length} put off` : "");
    setHidden(document.getElementById("plan-table"), steps.length === 0);
    const empty = document.getElementById("plan-empty");
    setHidden(empty, steps.length > 0);
    setText(empty, now.length + later.length ? `None of ${plural(now.length + later.length, "step")} is like that.` : "Nothing is under way, and nothing is put off: all stands where it is to stand. What would be weighed for one model: zerowake plan --why MODEL");
  }
}

class Row {
  constructor() {
    this.cells = ["What", "Of", "Where", "When", "Why"].map((label) => cell(label));
    this.element = make("tr", { role: "row" }, ...this.cells);
  }

  update(step) {
    const texts = [
      `${step.do}${step.rung ? ` → ${step.rung}` : ""}${step.times > 1 ? ` × ${step.times}` : ""}`,
      step.model ?? (step.snapshot ? snapshot(step.snapshot) : (step.replica ?? "–")),
      step.node ?? "Kubernetes chooses",
      step.for_seconds === null ? "under way" : `not for ${seconds(step.for_seconds)}`,
      step.why,
    ];
    this.cells.forEach((each, at) => setText(each, texts[at]));
  }
}
