// The tree at work: what was guessed for a step, shown beside the run of its tokens. A pointer shows it, a tap, or the
// arrow keys where a reply has the focus.

import { guessesOf } from "./reply.js";

const tip = document.getElementById("tip");
const MOST = 24; // guesses that are listed
let shown = null; // the text and the step that the tip is about; its runs may be drawn anew while a reply grows

/** Let a text of a reply show what was guessed. */
export function showsGuesses(element, reply) {
  element.tabIndex = 0;
  element.setAttribute("role", "group");
  const stepOf = event => event.target.closest?.(".run")?.dataset.step;
  const showAt = event => stepOf(event) && show(element, Number(stepOf(event)), reply);
  element.addEventListener("pointerover", event => event.pointerType === "mouse" && showAt(event));
  element.addEventListener("pointerleave", event => event.pointerType === "mouse" && hide());
  element.addEventListener("click", showAt);
  element.addEventListener("blur", hide);
  element.addEventListener("keydown", event => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!by || !document.body.classList.contains("trees")) return;
    event.preventDefault();
    const steps = [...new Set([...element.querySelectorAll(".run")].map(run => Number(run.dataset.step)))];
    const at = shown?.element === element ? steps.indexOf(shown.step) : -1;
    const next = steps[at === -1 && by < 0 ? steps.length - 1 : at + by];
    if (next !== undefined) show(element, next, reply);
  });
}

export function hide() {
  tip.hidden = true;
  for (const run of document.querySelectorAll(".run.lit")) run.classList.remove("lit");
  shown = null;
}

const runsOf = ({ element, step }) => [...element.querySelectorAll(`.run[data-step="${step}"]`)];

function show(element, step, reply) {
  if (!document.body.classList.contains("trees") || (shown?.element === element && shown.step === step)) return;
  hide();
  shown = { element, step };
  const runs = runsOf(shown);
  for (const run of runs) run.classList.add("lit");
  tip.replaceChildren(...about(step, reply));
  tip.hidden = false;
  runs[0].scrollIntoView({ block: "nearest" });
  place(runs[0].getClientRects()[0]);
}

/** The talk has moved, and may have been drawn anew. */
function follow() {
  const [run] = runsOf(shown);
  if (run) place(run.getClientRects()[0]);
  else hide();
}

function place(box) {
  const { offsetWidth: width, offsetHeight: height } = tip;
  const below = box.bottom + 8 + height < innerHeight || box.top < height + 16;
  const top = below ? Math.min(box.bottom + 8, innerHeight - height - 8) : box.top - height - 8;
  tip.style.top = `${Math.max(8, top)}px`;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
}

function about(step, reply) {
  const [tokens, thoughts, content] = reply.runs[step];
  const guesses = guessesOf(reply)[step];
  const title = make("strong", "", `Step ${step + 1}: ${tokens === 1 ? "one token" : `${tokens} tokens at once`}`);
  if (!guesses) return [title, make("p", "", "What was guessed is not kept when the page is left.")];
  const start = reply.runs.slice(0, step).reduce((sum, run) => sum + run[1] + run[2], 0);
  const text = (reply.thoughts + reply.content).slice(start, start + thoughts + content);
  if (guesses.length === 0) return [title, make("p", "", "Nothing was guessed: the model drew this by itself.")];
  const right = guesses.filter(guess => guess.accepted);
  const said = right.map(guess => guess.token).join("");
  const own = right.length < tokens && text.startsWith(said) ? text.slice(said.length) : "";
  const count = `${guesses.length} ${guesses.length === 1 ? "guess" : "guesses"}, ${right.length || "none"} right`;
  return [title, make("p", "", count + "; the last token is the model's own"), list(guesses, own)];
}

/** The guesses below one another, those that were right first and open. */
function list(guesses, own) {
  let left = MOST;
  const below = (parent, isPath) => {
    const here = guesses.map((guess, i) => ({ ...guess, i })).filter(guess => guess.parent === parent);
    here.sort((a, b) => b.accepted - a.accepted);
    const items = [];
    for (const guess of here) {
      if (left === 0) break;
      left -= 1;
      const item = make("li", guess.accepted ? "yes" : "no", "");
      item.append(token(guess.token), " ", make("small", "", guess.accepted ? "✓ right" : "✗"));
      if (!guess.accepted) item.append(make("span", "unseen", "wrong"));
      const inner = below(guess.i, guess.accepted);
      if (inner) item.append(inner);
      items.push(item);
    }
    if (isPath && !here.some(guess => guess.accepted) && own) {
      const item = make("li", "drawn", "");
      item.append(token(own), " ", make("small", "", "the model's own"));
      items.unshift(item);
    }
    if (!items.length) return null;
    const element = make("ul", "", "");
    element.append(...items);
    return element;
  };
  const all = below(-1, true);
  if (guesses.length > MOST) all.append(make("li", "", `and ${guesses.length - MOST} more`));
  return all;
}

const token = text => make("b", "", text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "·"));

function make(name, kind, text) {
  const element = document.createElement(name);
  if (kind) element.className = kind;
  element.textContent = text;
  return element;
}

addEventListener("scroll", event => event.target.id === "talk" && shown && follow(), true);
addEventListener("click", event => shown && !event.target.closest?.(".run, #tip") && hide());
