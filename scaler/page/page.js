// Listens to the scaler and draws what it says: the whole state once, then what changes, at most once a frame.

import { make, setData, setHidden, setText } from "./dom.js";
import { Models, standing } from "./models.js";
import { Nodes } from "./nodes.js";
import { Plan } from "./plan.js";
import { Starts, startsInShort } from "./starts.js";
import { State } from "./state.js";
import { clock, plural } from "./text.js";

const AGAIN_MILLISECONDS = 3000;

const state = new State();
const parts = [
  [new Models(), ["models", "replicas"]],
  [new Starts(), ["activations"]],
  [new Nodes(), ["nodes"]],
  [new Plan(), ["plan"]],
];
const filterField = document.getElementById("filter");
const pending = { changed: new Set(), frame: 0 };

function filter(...names) {
  const wanted = filterField.value.trim().toLowerCase();
  return !wanted || names.some((name) => name.toLowerCase().includes(wanted));
}

function later(changed) {
  for (const each of changed) pending.changed.add(each);
  pending.frame ||= requestAnimationFrame(draw);
}

function draw() {
  const began = performance.now();
  pending.frame = 0;
  state.changed = pending.changed;
  pending.changed = new Set();
  if (!state.heard) return;
  for (const [part, lists] of parts) if (lists.some((list) => state.changed.has(list))) part.show(state, filter);
  summary();
  setHidden(document.getElementById("missing"), !state.missing);
  setText(document.getElementById("missing"), state.missing ? `This is not whole yet: ${state.missing}` : "");
  const leads = state.leads ? "" : ", which does not lead";
  setText(document.getElementById("teller"), `Told by ${state.instance}${leads} · zerowake ${state.version} · as of ${clock(state.at)}`);
  performance.measure("draw", { start: began });
}

function summary() {
  const models = [...state.models.values()];
  const nodes = [...state.nodes.values()];
  const count = (is) => models.filter((model) => standing(model) === is).length;
  const unheard = nodes.filter(({ presence }) => presence !== "heard").length;
  const held = models.reduce((total, model) => total + model.held, 0);
  const median = startsInShort(state);
  const facts = [
    ["serving", `${count("serving")}`, `of ${plural(models.length, "model")}`],
    ["waiting", `${held}`, held === 1 ? "request" : "requests"],
    ["in trouble", `${count("in trouble")}`, count("in trouble") === 1 ? "model" : "models"],
    ["nodes", `${nodes.length - unheard}`, unheard ? `heard of ${nodes.length}` : "heard"],
    ...(median ? [["restored in", median.text, `median of ${median.of}`]] : []),
  ];
  const list = document.getElementById("summary");
  while (list.children.length > facts.length) list.lastElementChild.remove();
  facts.forEach(([term, number, of], at) => {
    const fact = list.children[at] ?? list.appendChild(make("div", {}, make("dt"), make("dd", {}, make("strong"), " ", make("span"))));
    setText(fact.firstElementChild, term);
    setText(fact.lastElementChild.firstElementChild, number);
    setText(fact.lastElementChild.lastElementChild, of);
    setData(fact, "loud", (term === "in trouble" || term === "waiting") && number !== "0" ? "yes" : "no");
  });
}

function connected(is, text) {
  const element = document.getElementById("connection");
  setData(element, "state", is);
  setText(element, text);
}

function listen() {
  const source = new EventSource("events");
  source.addEventListener("state", ({ data }) => {
    state.whole(JSON.parse(data));
    connected("live", "Live");
    later(state.changed);
  });
  source.addEventListener("change", ({ data }) => {
    state.change(JSON.parse(data));
    later(state.changed);
  });
  source.addEventListener("error", () => {
    connected("lost", "Connection lost, trying again. What is shown is old.");
    // The browser comes again by itself, but not after a refusal.
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, AGAIN_MILLISECONDS);
  });
}

filterField.addEventListener("input", () => later(["models", "activations", "nodes", "plan"]));
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, [contenteditable]");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    filterField.focus();
  } else if (event.key === "Escape" && event.target === filterField) {
    filterField.value = "";
    filterField.dispatchEvent(new Event("input"));
  }
});
listen();
