// Lines over time, and tables with bars.

const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const SPACE = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, BELOW] = [360, 150, 36, 18];

/** Draw lines. Args: lines: [{kind, label, points: [[x from 0 to 1, y], …]}]; span: the whole width, in words. */
export function drawLines(figure, lines, span) {
  const top = nice(Math.max(2, ...lines.flatMap(line => line.points.map(point => point[1]))));
  const x = at => LEFT + at * (WIDTH - LEFT), y = value => (HEIGHT - BELOW) * (1 - value / top) + 4;
  const plot = svg("svg", { class: "plot", viewBox: `0 0 ${WIDTH} ${HEIGHT + 4}`, role: "img" });
  const latest = lines.map(({ label, points }) => `${label} ${format(points.at(-1)?.[1] ?? 0)}`).join(", ");
  plot.setAttribute("aria-label", `The last ${span}; now ${latest}; the scale ends at ${format(top)}`);
  for (const value of [0, top / 2, top]) {
    plot.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH, y1: y(value), y2: y(value) }));
    plot.append(svg("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, format(value)));
  }
  plot.append(svg("text", { x: LEFT, y: HEIGHT + 2 }, `${span} ago`));
  plot.append(svg("text", { x: WIDTH, y: HEIGHT + 2, "text-anchor": "end" }, "now"));
  for (const { kind, points } of lines) {
    if (!points.length) continue;
    const path = points.map(([at, value]) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`).join(" L");
    const [from, to] = [x(points[0][0]), x(points.at(-1)[0])];
    plot.append(svg("path", { class: `area ${kind}`, d: `M${from},${y(0)} L${path} L${to},${y(0)} Z` }));
    plot.append(svg("path", { class: `line ${kind}`, d: `M${path}` }));
  }
  figure.replaceChildren(plot);
}

/** Fill a table. Args: rows: [[name, bar from 0 to 1 or null, text, …]]; none: what stands there without any. */
export function fillTable(table, rows, none, head) {
  const body = document.createElement("tbody");
  if (head) body.append(row(head.map(text => cell("th", text))));
  for (const [name, bar, ...texts] of rows) {
    const cells = [cell("th", name)];
    cells[0].scope = "row";
    if (bar !== null) {
      const place = cell("td", ""), drawn = place.appendChild(document.createElement("div"));
      place.className = "bar";
      drawn.style.width = `${Math.min(100, 100 * bar)}%`;
      cells.push(place);
    }
    body.append(row([...cells, ...texts.map(text => cell("td", text))]));
  }
  if (!rows.length) {
    const empty = cell("td", none);
    empty.className = "none";
    body.append(row([empty]));
  }
  table.replaceChildren(body);
}

export function format(value) {
  if (value >= 1000) return SHORT.format(value);
  return new Intl.NumberFormat("en", { maximumFractionDigits: value < 10 ? 1 : 0 }).format(value);
}

/** The next number that is round, as its half is. */
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 4, 6, 8, 10].find(step => step * power >= value * 0.999);
}

function svg(name, attributes, text = "") {
  const element = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

function row(cells) {
  const element = document.createElement("tr");
  element.append(...cells);
  return element;
}

function cell(name, text) {
  const element = document.createElement(name);
  element.textContent = text;
  return element;
}
