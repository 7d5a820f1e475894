// Numbers as people read them.

const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];

export function bytes(count) {
  let value = count;
  let unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${value < 9.95 && unit ? value.toFixed(1) : Math.round(value)} ${UNITS[unit]}`;
}

export function seconds(count) {
  if (count === null || count === undefined) return "–";
  if (count < 0.0005) return "0 ms";
  if (count < 0.9995) return `${count < 0.00995 ? (count * 1000).toFixed(1) : Math.round(count * 1000)} ms`;
  if (count < 99.5) return `${count < 9.995 ? count.toFixed(2) : count.toFixed(1)} s`;
  if (count < 5400) return `${Math.round(count / 60)} min`;
  if (count < 48 * 3600) return `${Math.round(count / 3600)} h`;
  return `${Math.round(count / 86400)} d`;
}

export function rate(count) {
  if (!count) return "–";
  return count < 0.095 ? `${(count * 60).toFixed(1)}/min` : `${count < 9.95 ? count.toFixed(1) : Math.round(count)}/s`;
}

export function next(count) {
  if (count === null) return "–";
  return count === 0 ? "now" : `in ${count < 59.5 ? `${Math.round(count)} s` : seconds(Math.max(count, 99.5))}`;
}

export function clock(moment) {
  const date = new Date(moment * 1000);
  const time = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  return date.toDateString() === new Date().toDateString() ? time : `${date.toLocaleDateString()} ${time}`;
}

/** A node or store without what all of them share; a snapshot without its namespace where that is the usual one. */
export function snapshot(name) {
  return name.replace(/^default\//, "");
}

export function plural(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

/** By its name alone, so that a snapshot has the same colour everywhere: a hue, in degrees. */
export function hue(name) {
  let hash = 2166136261;
  for (let at = 0; at < name.length; at += 1) hash = Math.imul(hash ^ name.charCodeAt(at), 16777619);
  return ((hash >>> 0) * 0.61803398875 * 360) % 360;
}
