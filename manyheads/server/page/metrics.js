// What /metrics says, and what changed between two readings.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const PREFIX = "manyheads_";

/** One reading: values by name, and by the value of a label where there is one. */
export class Reading {
  constructor(text, at) {
    this.at = at;
    this.values = new Map();
    for (const line of text.split("\n")) {
      const match = LINE.exec(line);
      if (!match || !match[1].startsWith(PREFIX)) continue;
      const labels = [...(match[2] ?? "").matchAll(LABEL)].map(([, , value]) => value);
      const name = match[1].slice(PREFIX.length);
      if (!this.values.has(name)) this.values.set(name, new Map());
      this.values.get(name).set(labels.join(), Number(match[3]));
    }
  }

  get(name, label = "") {
    return this.values.get(name)?.get(label) ?? 0;
  }

  /** [[label, value], …] of a metric that has several. */
  all(name) {
    return [...(this.values.get(name) ?? [])];
  }

  has(name) {
    return this.values.has(name);
  }
}

/** How much a counter grew. One that became smaller began again, since its engine did. */
export function growth(before, now, name, label = "") {
  const [from, to] = [before.get(name, label), now.get(name, label)];
  return to >= from ? to - from : to;
}

/** A value below which such a share of a histogram's growth lies, as Prometheus has it; null where nothing came. */
export function quantile(before, now, name, share) {
  const bounds = now.all(name + "_bucket").map(([bound]) => bound);
  const counts = bounds.map(bound => growth(before, now, name + "_bucket", bound));
  const all = counts.at(-1) ?? 0;
  if (!all) return null;
  const i = counts.findIndex(count => count >= share * all);
  const edge = bounds.map(bound => (bound === "+Inf" ? Infinity : Number(bound)));
  if (edge[i] === Infinity) return edge[i - 1];
  const low = i ? edge[i - 1] : 0, under = i ? counts[i - 1] : 0;
  return low + ((edge[i] - low) * (share * all - under)) / (counts[i] - under);
}
