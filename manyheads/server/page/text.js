// A reply's text on the page: Markdown, in which each step's tokens are one run.

import { blocks } from "./markdown.js";

/** Shows a growing text in an element; what stands there already is left alone, so that it can be pointed at. */
export class TextView {
  constructor(element) {
    this.element = element;
    this.shown = [];
  }

  /** Args: runs: of each step [tokens, characters]. */
  update(text, runs) {
    const found = blocks(text);
    const ends = [];
    for (const [, length] of runs) ends.push((ends.at(-1) ?? 0) + length);
    const keys = found.map(block => JSON.stringify([block, block.pieces.map(([a, b]) => text.slice(a, b))]));
    let same = 0;
    while (same < keys.length && keys[same] === this.shown[same]) same += 1;
    while (this.element.children.length > same) this.element.lastChild.remove();
    for (const block of found.slice(same)) this.element.append(drawn(block, text, runs, ends));
    this.shown = keys;
  }
}

function drawn(block, text, runs, ends) {
  const element = document.createElement({ pre: "pre", h3: "h3" }[block.kind] ?? "p");
  if (block.kind === "item" || block.kind === "quote") element.className = block.kind;
  if (block.marker) element.dataset.marker = block.marker;
  if (block.depth) element.style.setProperty("--depth", block.depth);
  for (const [start, end, mark] of block.pieces) {
    const into = mark ? element.appendChild(document.createElement(mark)) : element;
    fill(into, start, end, text, runs, ends);
  }
  return element;
}

/** Put a part of the text into an element, cut where runs end. */
function fill(into, start, end, text, runs, ends) {
  let i = first(ends, start);
  while (start < end) {
    const stop = Math.min(end, ends[i] ?? end), tokens = runs[i]?.[0] ?? 0;
    const part = text.slice(start, stop);
    if (tokens === 0) into.append(part);
    else if (part.trim() === "") into.append(part);
    else {
      const run = into.appendChild(document.createElement("span"));
      run.className = `run n${Math.min(tokens, 5)}`;
      run.dataset.step = i;
      run.textContent = part.trimStart();
      run.before(part.slice(0, part.length - run.textContent.length)); // space is nobody's
    }
    start = stop;
    do i += 1; while (ends[i] <= start); // steps that showed nothing
  }
}

/** The first run that ends behind a place. */
function first(ends, place) {
  let low = 0, high = ends.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ends[middle] > place) high = middle;
    else low = middle + 1;
  }
  return low;
}
