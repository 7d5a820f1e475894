// The map of nodes × rungs, and what moves on it. A node's row is filled when it is near the screen: of a thousand, a few are.

import { Children, Opener, Shortened, cell, facts, heading, make, setData, setHidden, setStyle, setText } from "./dom.js";
import { bytes, hue, plural, seconds, snapshot } from "./text.js";

const FIRST = 20;
const CHIPS = 6; // in a cell; the rest is counted, and in the details
const MOVES = 12; // in the list of all nodes'
const COLUMNS = [
  ["disk", "Disk"],
  ["memory", "Memory"],
  ["asleep", "Asleep"],
  ["gpu", "GPU"],
];

export class Nodes {
  constructor() {
    this.body = document.querySelector("#nodes-table tbody");
    this.rows = new Children(this.body, (node) => new Row(node, this.near));
    this.moves = new Children(document.getElementById("moving-list"), () => new Moving());
    const seen = (entries) => {
      for (const entry of entries) entry.target.row.seen(entry.isIntersecting);
    };
    this.shortened = new Shortened(document.getElementById("nodes-more"), FIRST, "nodes", () => this.show(this.state, this.filter));
    this.near = new IntersectionObserver(seen, { rootMargin: "600px 0px" });
  }

  show(state, filter) {
    this.state = state;
    this.filter = filter;
    const all = state.ordered("nodes");
    const fits = (node) => filter(node.name) || node.moves.some(({ snapshot: name }) => filter(name)) || node.copies.some(({ snapshot: name }) => filter(name));
    const named = all.filter(fits);
    // Those first that somebody should look at.
    const shown = [...named.filter(({ presence }) => presence !== "heard"), ...named.filter(({ presence }) => presence === "heard")];
    this.rows.show(this.shortened.of(shown), ({ address }) => address);
    this.fleet(named);
    setText(document.getElementById("nodes-count"), shown.length === all.length ? `${all.length}` : `${shown.length} of ${all.length}`);
    const moves = shown.flatMap((node) => node.moves.map((move) => ({ ...move, node: node.name, key: `${node.address} ${move.to} ${move.snapshot}` })));
    setHidden(document.getElementById("moving"), moves.length === 0);
    setText(document.getElementById("moving-count"), moves.length > MOVES ? `${MOVES} of ${moves.length}` : `${moves.length}`);
    this.moves.show(moves.slice(0, MOVES), ({ key }) => key);
    const empty = document.getElementById("nodes-empty");
    setHidden(empty, shown.length > 0);
    setText(empty, all.length ? "No node is like that now." : "No restore agent is connected: each runs on its node as `zerowake agent`, or in the chart's DaemonSet.");
  }

  fleet(nodes) {
    const list = document.getElementById("fleet");
    setHidden(list, nodes.length < 2);
    rungsOf(nodes).forEach(([rung, text, share], at) => {
      const fact = list.children[at] ?? list.appendChild(make("div", {}, make("dt"), make("dd"), make("div", { class: "gauge", "aria-hidden": "true" }, make("i", { "data-kind": "images" }))));
      setText(fact.children[0], `All nodes, ${rung}`);
      setText(fact.children[1], text);
      setHidden(fact.children[2], !share);
      setStyle(fact.children[2].firstElementChild, "inline-size", `${((share ?? 0) * 100).toFixed(1)}%`);
    });
  }
}

/** All nodes together, where they are several. */
function rungsOf(nodes) {
  const used = (rung) => nodes.reduce((total, node) => total + (node.rungs[rung]?.image_bytes ?? 0), 0);
  const images = (rung) => nodes.reduce((total, node) => total + (node.rungs[rung]?.images ?? 0), 0);
  const memory = nodes.reduce((total, node) => total + (node.memory.staged_limit_bytes ?? 0), 0);
  const gpus = nodes.flatMap((node) => node.gpus);
  const free = sum(gpus, "free_bytes");
  const total = sum(gpus, "total_bytes");
  const asleep = images("standby") + images("parked");
  return [
    ["disk", `${plural(images("disk"), "image")} · ${bytes(used("disk"))}`, null],
    ["memory", `${plural(images("memory"), "image")} · ${bytes(used("memory"))}${memory ? ` of ${bytes(memory)}` : ""}`, memory && used("memory") / memory],
    ["asleep", asleep ? `${images("standby")} standby, ${images("parked")} parked` : "none", null],
    ["GPU", total ? `${plural(gpus.length, "GPU")} · ${bytes(total - free)} of ${bytes(total)}` : "no GPU", total && (total - free) / total],
  ];
}

function part(move) {
  return move.total_bytes ? Math.min(1, move.done_bytes / move.total_bytes) : 0;
}

class Moving {
  constructor() {
    this.what = make("span", { class: "what" });
    this.how = make("span", { class: "how" });
    this.bar = make("progress", { max: "100" });
    this.element = make("li", {}, this.what, this.bar, this.how);
  }

  update(move) {
    setText(this.what, `${snapshot(move.snapshot)}: ${move.above} → ${move.to} on ${move.node}`);
    this.bar.value = Math.round(part(move) * 100);
    this.bar.setAttribute("aria-label", this.what.textContent);
    setText(this.how, move.total_bytes ? `${bytes(move.done_bytes)} of ${bytes(move.total_bytes)}` : "its size is not known yet");
  }
}

class Row {
  constructor(node, near) {
    this.near = near;
    this.visible = false;
    this.opener = new Opener(node.name, () => this.tell());
    this.badge = make("span", { class: "badge" });
    this.element = make("tr", { role: "row" }, heading({}, this.opener.button, this.badge));
    this.element.row = this;
    near.observe(this.element);
  }

  gone() {
    this.near.unobserve(this.element);
  }

  seen(visible) {
    this.visible = visible;
    if (visible && this.shown !== this.item) this.fill();
  }

  update(node) {
    setText(this.opener.name, node.name);
    const is = node.presence !== "heard" ? node.presence : node.cordoned ? "cordoned" : "";
    setText(this.badge, is);
    setHidden(this.badge, !is);
    if (this.visible) this.fill();
  }

  fill() {
    const node = (this.shown = this.item);
    if (!this.cells) {
      this.cells = new Map(COLUMNS.map(([rung, label]) => [rung, new RungCell(label)]));
      this.more = cell("", { class: "more" });
      this.element.append(...[...this.cells.values()].map((each) => each.element), this.more);
    }
    const on = new Map(COLUMNS.map(([rung]) => [rung, []]));
    for (const copy of node.copies) {
      on.get(column(copy.rung)).push({ key: copy.snapshot, name: copy.snapshot, size: copy.image_bytes, rung: copy.rung, unusable: copy.unusable });
      if (copy.weights_rung === "gpu" && copy.weights_bytes) on.get("gpu").push({ key: `${copy.snapshot} weights`, name: copy.snapshot, size: copy.weights_bytes, rung: "weights" });
    }
    for (const move of node.moves) {
      const there = on.get(column(move.to));
      there.unshift({ key: `${move.snapshot} moving`, name: move.snapshot, size: move.total_bytes, rung: move.to, moving: part(move) });
    }
    const { memory } = node;
    this.cells.get("disk").update(on.get("disk"), said(node, "disk"), []);
    const staged = memory.staged_bytes ?? 0;
    const others = Math.max(0, memory.total_bytes - memory.free_bytes - staged);
    this.cells.get("memory").update(on.get("memory"), `${said(node, "memory")} · ${bytes(memory.free_bytes)} free`, [
      ["others", others / memory.total_bytes],
      ["images", staged / memory.total_bytes],
    ]);
    this.cells.get("asleep").update(on.get("asleep"), said(node, "standby", "parked"), []);
    const total = sum(node.gpus, "total_bytes");
    this.cells.get("gpu").update(on.get("gpu"), total ? `${plural(node.gpus.length, "GPU")} · ${bytes(sum(node.gpus, "free_bytes"))} free of ${bytes(total)}` : "no GPU", total ? [
      ["others", sum(node.gpus, "others_bytes") / total],
      ["parked", sum(node.gpus, "parked_bytes") / total],
      ["images", sum(node.gpus, "pool_bytes") / total],
    ] : []);
    this.tell();
  }

  tell() {
    if (!this.more) return;
    setHidden(this.more, !this.opener.open);
    if (!this.opener.open) return;
    const node = this.item;
    const { rates } = node;
    const speed = (count) => (count ? `${bytes(count)}/s` : "not measured yet");
    const pairs = [
      ["Agent", `${node.address}${node.zone ? `, zone ${node.zone}` : ""}`],
      ["Store or node → disk", speed(rates.remote_to_disk)],
      ["Disk → memory", speed(rates.disk_to_memory)],
      ["Memory → process", speed(rates.memory_to_process)],
      ["Memory → GPU", speed(rates.memory_to_gpu)],
      ...node.gpus.map((gpu) => [gpu.model ?? "GPU", `${gpu.uuid}: ${bytes(gpu.free_bytes)} free of ${bytes(gpu.total_bytes)}`]),
      ...node.sources.map((each) => [`From ${each.name}`, each.fault ?? speed(each.rate)]),
    ];
    const rows = node.copies.map((copy) =>
      make("tr", {}, make("th", { scope: "row" }, snapshot(copy.snapshot)), make("td", {}, copy.rung), make("td", { class: "number" }, bytes(copy.image_bytes)), make("td", {}, copy.weights_rung ? `${bytes(copy.weights_bytes)} in ${copy.weights_rung}` : "–"), make("td", { class: "number" }, copy.unusable ?? seconds(copy.seconds_to_serve))),
    );
    const head = ["Snapshot", "Rung", "Image", "Weights", "Serves in"].map((text) => make("th", { scope: "col" }, text));
    const table = make("table", { class: "copies", "aria-label": `Snapshots on ${node.name}` }, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
    this.more.replaceChildren(facts(pairs), rows.length ? table : "");
  }
}

function column(rung) {
  return rung === "standby" || rung === "parked" ? "asleep" : rung === "disk" || rung === "remote" || rung === "absent" ? "disk" : rung === "gpu" ? "gpu" : "memory";
}

function sum(things, field) {
  return things.reduce((total, each) => total + (each[field] ?? 0), 0);
}

function said(node, ...rungs) {
  const uses = rungs.map((rung) => node.rungs[rung]).filter(Boolean);
  const images = sum(uses, "images");
  return images ? `${plural(images, "image")} · ${bytes(sum(uses, "image_bytes"))}` : "none";
}

class RungCell {
  constructor(label) {
    this.said = make("p", { class: "said" });
    this.gauge = make("div", { class: "gauge", "aria-hidden": "true" });
    this.list = make("ul", { class: "chips" });
    this.chips = new Children(this.list, () => new Chip());
    this.rest = make("p", { class: "rest" });
    this.element = cell(label, { class: "rung" }, this.said, this.gauge, this.list, this.rest);
  }

  update(things, text, parts) {
    setText(this.said, text);
    setHidden(this.gauge, parts.length === 0);
    parts.forEach(([kind, share], at) => {
      const bar = this.gauge.children[at] ?? this.gauge.appendChild(make("i"));
      setData(bar, "kind", kind);
      setStyle(bar, "inline-size", `${(share * 100).toFixed(1)}%`);
    });
    setHidden(this.list, things.length === 0);
    this.chips.show(things.slice(0, CHIPS), ({ key }) => key);
    setHidden(this.rest, things.length <= CHIPS);
    setText(this.rest, `and ${things.length - CHIPS} more`);
  }
}

class Chip {
  constructor() {
    this.name = make("span", { class: "name" });
    this.size = make("span", { class: "size" });
    this.element = make("li", { class: "chip" }, this.name, this.size);
  }

  update(thing) {
    const moving = thing.moving !== undefined;
    setText(this.name, snapshot(thing.name));
    const rung = ["disk", "memory", "gpu"].includes(thing.rung) ? "" : `${thing.rung} · `;
    setText(this.size, moving ? `${Math.round(thing.moving * 100)} %` : rung + bytes(thing.size));
    setStyle(this.element, "--hue", hue(thing.name).toFixed(0));
    setStyle(this.element, "--full", moving ? thing.moving.toFixed(4) : "1");
    setData(this.element, "moving", moving ? "yes" : "no");
    setData(this.element, "unusable", thing.unusable ? "yes" : "no");
  }
}
