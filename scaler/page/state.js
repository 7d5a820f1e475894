// The state as the scaler tells it: whole once, and then what changed (changes.py). A thing that changed is a new object here.

const KEYS = { models: "name", nodes: "address", replicas: "id", activations: "id" };

const inOrder = new Intl.Collator("en", { numeric: true }).compare;

export class State {
  constructor() {
    this.heard = false;
    this.order = {};
  }

  /** Those of a list, by their names as people count: 2 before 10. */
  ordered(list) {
    this.order[list] ??= [...this[list].keys()].sort(list === "nodes" ? (a, b) => inOrder(this.nodes.get(a).name, this.nodes.get(b).name) : inOrder);
    return this.order[list].map((key) => this[list].get(key));
  }

  whole(told) {
    Object.assign(this, told);
    for (const [list, key] of Object.entries(KEYS)) this[list] = new Map(told[list].map((each) => [each[key], each]));
    this.heard = true;
    this.order = {};
    this.changed = new Set(Object.keys(told));
  }

  change(told) {
    const { set = {}, gone = {}, ...rest } = told;
    Object.assign(this, rest);
    this.changed = new Set([...Object.keys(rest), ...Object.keys(set), ...Object.keys(gone)]);
    for (const [list, keys] of Object.entries(gone)) {
      for (const key of keys) this[list].delete(key);
      if (keys.length) delete this.order[list];
    }
    for (const [list, things] of Object.entries(set)) {
      for (const [key, fields] of Object.entries(things)) {
        if (!this[list].has(key) || "name" in fields) delete this.order[list];
        this[list].set(key, { ...this[list].get(key), ...fields });
      }
    }
  }
}
