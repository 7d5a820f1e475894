// Elements, made of text and numbers alone: there is no way through here by which what somebody named could become HTML.

/** An element. `of`: `class`, `style` (an object of properties), `on` (an object of listeners), all else as attributes; false or null: none. */
export function make(tag, of = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(of)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "style") for (const [property, text] of Object.entries(value)) element.style.setProperty(property, text);
    else if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...inside.filter((each) => each !== null && each !== undefined && each !== false && each !== ""));
  return element;
}

/** Sets it only where it is another: what is the same is not laid out again, and not read out again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setStyle(element, property, text) {
  if (element.style.getPropertyValue(property) !== text) element.style.setProperty(property, text);
}

export function setData(element, name, text) {
  if (element.dataset[name] !== text) element.dataset[name] = text;
}

export function setHidden(element, hidden) {
  if (element.hidden !== hidden) element.hidden = hidden;
}

/** A cell of a table that is laid out as blocks: its role is said, since browsers forget it then. `label`: its column's, for narrow screens. */
export function cell(label, of = {}, ...inside) {
  return make("td", { role: "cell", "data-label": label, ...of }, ...inside);
}

export function heading(of = {}, ...inside) {
  return make("th", { role: "rowheader", scope: "row", ...of }, ...inside);
}

/**
 * Keeps an element's children in step with a list, by key: what stays is kept, with its focus and what is open in it.
 * A child is `{element, update(item)}`; it is updated only where its item is another object than before.
 */
export class Children {
  constructor(parent, makeChild) {
    this.parent = parent;
    this.makeChild = makeChild;
    this.known = new Map();
  }

  show(items, keyOf) {
    const kept = new Map();
    for (const item of items) {
      const key = keyOf(item);
      const child = this.known.get(key) ?? this.makeChild(item);
      if (child.item !== item) {
        child.item = item;
        child.update(item);
      }
      kept.set(key, child);
    }
    for (const [key, child] of this.known) {
      if (!kept.has(key)) {
        child.element.remove();
        child.gone?.();
      }
    }
    this.known = kept;
    let next = this.parent.firstElementChild;
    let fresh = null;
    for (const { element } of kept.values()) {
      if (element === next) {
        if (fresh) next.before(fresh);
        fresh = null;
        next = next.nextElementSibling;
      } else if (element.isConnected) {
        if (fresh) this.parent.insertBefore(fresh, next);
        fresh = null;
        // Where a browser has it, what is moved so keeps the focus.
        if (this.parent.moveBefore) this.parent.moveBefore(element, next);
        else this.parent.insertBefore(element, next);
      } else {
        fresh ??= document.createDocumentFragment();
        fresh.append(element);
      }
    }
    if (fresh) this.parent.insertBefore(fresh, next);
  }
}

/** A list of which the first few are shown until a person asks for all. `again`: draws what is shown. */
export class Shortened {
  constructor(button, first, what, again) {
    this.button = button;
    this.first = first;
    this.what = what;
    this.all = false;
    button.addEventListener("click", () => {
      this.all = !this.all;
      again();
    });
  }

  of(items) {
    setHidden(this.button, items.length <= this.first);
    setText(this.button, this.all ? `Show the first ${this.first} alone` : `Show all ${items.length.toLocaleString("en")} ${this.what}`);
    this.button.setAttribute("aria-expanded", String(this.all));
    return this.all ? items : items.slice(0, this.first);
  }
}

/** The name at the head of a row, which opens what there is to say besides. `fill`: makes that, where it is open. */
export class Opener {
  constructor(name, fill) {
    this.open = false;
    this.name = make("span", { class: "name" }, name);
    this.button = make("button", { type: "button", class: "opener", "aria-expanded": "false", on: { click: () => this.toggle() } }, this.name);
    this.fill = fill;
  }

  toggle() {
    this.open = !this.open;
    this.button.setAttribute("aria-expanded", String(this.open));
    this.fill();
  }
}

/** Terms and what they are. */
export function facts(pairs) {
  return make("dl", { class: "facts" }, ...pairs.flatMap(([term, text]) => [make("dt", {}, term), make("dd", {}, text)]));
}
