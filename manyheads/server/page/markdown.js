// The few marks of Markdown that models write: what of a text is shown, and how. Whatever is not understood is shown as
// it is. The result names places of the text, so that whoever shows it can say of each character where it came from.

const FENCE = /^\s*(```|~~~)\s*([\w.+#-]*)\s*$/; // perhaps with a language's name, which is left out
const HEADING = /^#{1,6}\s+/;
const ITEM = /^(\s*)([-*+]|\d{1,3}[.)])\s+/;
const QUOTE = /^>\s?/;
const INLINE = new RegExp(
  [
    /(`+)(?!`)(.+?)(?<!`)\1(?!`)/,
    /\*\*(?=\S)(.+?)(?<=\S)\*\*/,
    /(?<![\w*])\*(?=[^\s*])([^*\n]+?)(?<=\S)\*(?![\w*])/,
  ].map(part => part.source).join("|"),
  "g",
);

/** Blocks, each {kind, marker, depth, pieces}; a piece is [start, end, mark] with "", "code", "strong" or "em". */
export function blocks(text) {
  const found = [];
  let at = 0, fence = null, open = false; // open: whether the next line may belong to the last block

  const put = (kind, from, to, more = {}) => {
    let block = found.at(-1);
    if (open && block.kind === kind && !more.marker) block.pieces.push([from - 1, from, ""]);
    else found.push((block = { kind, pieces: [], ...more }));
    if (kind === "pre") block.pieces.push([from, to, ""]);
    else inline(text, from, to, block.pieces);
    open = kind !== "h3";
  };

  for (const line of text.split("\n")) {
    const end = at + line.length;
    let match;
    if (fence !== null) {
      if (line.trim() === fence) [fence, open] = [null, false];
      else put("pre", at, end);
    } else if ((match = FENCE.exec(line))) {
      [fence, open] = [match[1], false];
    } else if (line.trim() === "") {
      open = false;
    } else if ((match = HEADING.exec(line))) {
      open = false;
      put("h3", at + match[0].length, end);
    } else if ((match = ITEM.exec(line))) {
      const marker = /\d/.test(match[2]) ? match[2] : "•";
      put("item", at + match[0].length, end, { marker, depth: Math.min(4, match[1].length >> 1) });
    } else if ((match = QUOTE.exec(line))) {
      put("quote", at + match[0].length, end);
    } else if (line.startsWith("|")) {
      put("pre", at, end);
    } else {
      put(open && found.at(-1).kind === "item" ? "item" : "p", at, end);
    }
    at = end + 1;
  }
  return found;
}

function inline(text, from, to, pieces) {
  const line = text.slice(from, to);
  let at = 0;
  for (const match of line.matchAll(INLINE)) {
    const [mark, shown] = match[2] ? ["code", match[2]] : match[3] ? ["strong", match[3]] : ["em", match[4]];
    const start = match.index + (match[0].length - shown.length) / 2;
    if (match.index > at) pieces.push([from + at, from + match.index, ""]);
    pieces.push([from + start, from + start + shown.length, mark]);
    at = match.index + match[0].length;
  }
  if (at < line.length) pieces.push([from + at, to, ""]);
}
