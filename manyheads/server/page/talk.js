// The messages of a chat on the page.

import { running } from "./reply.js";
import { TextView } from "./text.js";
import { showsGuesses } from "./tree.js";

const list = document.getElementById("messages"), talk = document.getElementById("talk");
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const views = new Map(); // message → its view, of the chat that is shown

/** Show a chat. `does` has what the buttons below messages do: retry, goOn, edit. */
export function showChat(chat, does) {
  views.clear();
  list.replaceChildren();
  chat.messages.forEach((message, i) => {
    const view = message.role === "user" ? userView(chat, i, does) : replyView(chat, i, does);
    views.set(message, view);
    list.append(view.element);
  });
  document.getElementById("welcome").hidden = chat.messages.length > 0;
  mark(chat);
  talk.scrollTop = talk.scrollHeight;
}

/** Show what has come to the last reply of the chat that is shown. */
export function showNews(chat) {
  const isAtEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
  views.get(chat.messages.at(-1))?.update();
  mark(chat);
  if (isAtEnd) talk.scrollTop = talk.scrollHeight;
}

/** Say where the messages begin that the model was told when it last answered. */
function mark(chat) {
  const unseen = chat.messages.at(-1)?.unseen ?? 0;
  [...list.querySelectorAll(".message")].forEach((element, i) => element.classList.toggle("forgotten", i < unseen));
  const there = list.querySelector(".cut");
  if (unseen === 0) return there?.remove();
  const what = unseen === 1 ? "message" : `${unseen} messages`;
  const text = `The model no longer sees the ${what} above: its context is full.`;
  if (there?.textContent === text) return;
  there?.remove();
  list.querySelectorAll(".message")[unseen].before(make("p", "cut", text));
}

function userView(chat, at, does) {
  const element = make("article", "message user"), text = make("div", "text", chat.messages[at].content);
  element.append(make("span", "unseen", "You:"), text, buttons([["Edit", () => edit(element, chat, at, does)]]));
  return { element, update() {} };
}

function edit(element, chat, at, does) {
  if (running.has(chat.id)) return;
  const form = make("form", "edit"), box = document.createElement("textarea"), ends = document.createElement("div");
  const before = [...element.childNodes];
  box.value = chat.messages[at].content;
  box.setAttribute("aria-label", "Edit the message");
  box.rows = Math.min(10, box.value.split("\n").length + 1);
  const leave = () => {
    element.replaceChildren(...before);
    element.querySelector("button").focus();
  };
  ends.append(button("Cancel", leave), Object.assign(make("button", "go_on", "Send"), { type: "submit" }));
  form.append(box, ends);
  form.onsubmit = event => {
    event.preventDefault();
    if (box.value.trim()) does.edit(at, box.value.trim());
    else leave();
  };
  box.onkeydown = event => {
    if (event.key === "Escape") leave();
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  };
  element.replaceChildren(form);
  box.focus();
}

function replyView(chat, at, does) {
  const reply = chat.messages[at];
  const element = make("article", "message reply"), body = make("div", "body"), thought = make("div", "body");
  const thoughts = make("details", "thoughts"), note = make("span", "note"), foot = make("div", "foot");
  const line = make("span", "does");
  element.dataset.reply = "";
  thoughts.append(make("summary", "", "Thoughts"), thought);
  foot.append(note, line);
  element.append(make("span", "unseen", "Reply:"), thoughts, body, foot);
  const content = new TextView(body), inner = new TextView(thought);
  for (const part of [body, thought]) {
    showsGuesses(part, reply);
    part.setAttribute("aria-label", "Reply; with the arrow keys, what was guessed in each step");
  }
  let shown = "";
  const update = () => {
    const isRunning = running.has(chat.id) && reply === chat.messages.at(-1);
    content.update(reply.content, reply.runs.map(run => [run[0], run[2]]));
    if (reply.thoughts) inner.update(reply.thoughts, reply.runs.map(run => [run[0], run[1]]));
    thoughts.hidden = !reply.thoughts;
    if (isRunning && reply.thoughts) thoughts.open = !reply.content;
    body.classList.toggle("busy", isRunning);
    body.setAttribute("aria-busy", isRunning);
    note.textContent = told(reply, isRunning);
    note.classList.toggle("error", reply.end === "error");
    const names = isRunning ? [] : offered(chat, at);
    if (names.join() === shown) return;
    shown = names.join();
    line.replaceChildren(...names.map(name => button(name, () => act(name, chat, at, does, line))));
  };
  update();
  return { element, update };
}

function offered(chat, at) {
  const reply = chat.messages[at], isLast = at === chat.messages.length - 1;
  const goesOn = isLast && reply.content && reply.end !== "stop";
  const copies = reply.content && navigator.clipboard;
  return [...(copies ? ["Copy"] : []), "Retry", ...(goesOn ? ["Continue"] : [])];
}

function act(name, chat, at, does, line) {
  if (name === "Retry") does.retry(at);
  else if (name === "Continue") does.goOn();
  else {
    navigator.clipboard.writeText(chat.messages[at].content).then(() => {
      line.firstChild.textContent = "Copied";
      setTimeout(() => (line.firstChild.textContent = "Copy"), 1500);
    });
  }
}

/** What stands below a reply: how it ended, and how fast it came. */
function told(reply, isRunning) {
  const { tokens, steps, wait, ms, timed } = reply.stats ?? { tokens: 0 };
  const cut = reply.fills ? "cut off: the context is full" : "cut off at its limit";
  const ends = { length: cut, stopped: "stopped", error: reply.error, abort: "cut off" };
  const parts = isRunning ? [] : reply.end === null ? ["the page was left"] : [ends[reply.end]];
  if (tokens) {
    parts.push(`${number.format(tokens)} tokens`, `${(tokens / steps).toFixed(1)} a step`);
    if (timed && ms) parts.push(`${number.format((1000 * timed) / ms)} tokens/s`);
    if (!isRunning) parts.push(`first after ${number.format(wait)} ms`);
  }
  return parts.filter(Boolean).join(" · ");
}

function buttons(pairs) {
  const line = make("span", "does");
  line.append(...pairs.map(([name, act]) => button(name, act)));
  return line;
}

const button = (name, act) => Object.assign(make("button", "", name), { type: "button", onclick: act });

function make(name, kind = "", text = "") {
  const element = document.createElement(name);
  if (kind) element.className = kind;
  element.textContent = text;
  return element;
}
