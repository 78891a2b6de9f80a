// The chat page: which chat is shown, and what its controls do.

import { ask, ServerError } from "./api.js";
import { answer, newReply, running, stop } from "./reply.js";
import { startSettings } from "./settings.js";
import * as store from "./store.js";
import { showChat, showNews } from "./talk.js";
import { hide } from "./tree.js";

const $ = id => document.getElementById(id);
const open = new Map(); // chats in this tab by id: a reply goes on writing into its own, whichever is shown
let chat = store.newChat();

const does = {
  retry: at => branch(at, chat.messages.slice(0, at)),
  edit: (at, content) => branch(at + 1, [...chat.messages.slice(0, at), { role: "user", content }]),
  goOn: () => reply(),
};

/** Answer these messages: in this chat, or if more was said behind the reply at this place, in another one. */
function branch(at, messages) {
  if (running.has(chat.id)) return;
  if (at < chat.messages.length - 1) show(store.newChat(structuredClone(messages), chat.title));
  else chat.messages = messages;
  chat.messages.push(newReply());
  reply();
}

async function reply() {
  const mine = chat;
  open.set(mine.id, mine);
  let waits = false;
  const told = kept => {
    if (kept === false) toast("This browser has no room left: export and delete chats.");
    if (waits) return;
    waits = true;
    setTimeout(() => { // not with each of a thousand events
      waits = false;
      if (mine === chat) showNews(mine);
    }, 30);
  };
  const answered = answer(mine, told);
  show(mine);
  await answered;
  if (mine.removed) return;
  listChats();
  const { content, error, status } = mine.messages.at(-1);
  if (status === 401) askForKey();
  if (mine !== chat) return;
  showNews(mine);
  showControls();
  $("spoken").textContent = error ?? content;
}

function send(text) {
  if (!text || running.has(chat.id)) return;
  chat.title ||= text.replace(/\s+/g, " ").slice(0, 60);
  chat.messages.push({ role: "user", content: text }, newReply());
  $("prompt").value = "";
  reply();
}

function show(which) {
  hide();
  chat = which;
  showChat(chat, does);
  showControls();
  listChats();
  document.body.classList.remove("side_open");
  $("side_open").setAttribute("aria-expanded", "false");
  // so that a reload, or the way back from another page, comes to the same chat
  history.replaceState(null, "", chat.messages.length ? `#${chat.id}` : location.pathname);
}

function showControls() {
  const halts = running.has(chat.id);
  $("send").classList.toggle("halts", halts);
  $("send").setAttribute("aria-label", halts ? "Stop" : "Send");
  if (document.activeElement !== $("title")) $("title").value = chat.title;
  document.title = chat.title ? `${chat.title} · manyheads` : "manyheads";
  $("more_open").hidden = chat.messages.length === 0;
}

function listChats() {
  const focused = document.activeElement.closest?.("#chats") && document.activeElement.dataset.id;
  $("chats").replaceChildren(...store.chats().map(kept => {
    const item = document.createElement("li"), button = item.appendChild(document.createElement("button"));
    Object.assign(button, { type: "button", textContent: kept.title, onclick: () => show(found(kept.id)) });
    button.dataset.id = kept.id;
    if (kept.id === chat.id) button.setAttribute("aria-current", "true");
    if (running.has(kept.id)) {
      button.className = "busy";
      button.append(Object.assign(document.createElement("span"), { className: "unseen", textContent: " (answering)" }));
    }
    if (kept.id === focused) queueMicrotask(() => button.focus());
    return item;
  }));
}

const found = id => open.get(id) ?? open.set(id, store.chat(id)).get(id);

function fresh() {
  show(store.newChat());
  $("prompt").focus();
}

function remove() {
  const gone = chat;
  $("more").hidePopover();
  stop(gone);
  gone.removed = true;
  store.removeChat(gone.id);
  fresh();
  toast(`“${gone.title}” is deleted.`, () => {
    delete gone.removed;
    store.saveChat(gone);
    show(gone);
  });
}

let toastEnds = 0;
function toast(text, undo) {
  clearTimeout(toastEnds);
  $("toast").firstElementChild.textContent = text;
  $("toast").lastElementChild.hidden = !undo;
  $("toast").lastElementChild.onclick = () => {
    $("toast").hidden = true;
    undo();
  };
  $("toast").hidden = false;
  toastEnds = setTimeout(() => ($("toast").hidden = true), 10000);
}

function save(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
  $("more").hidePopover();
}

const fileName = () => chat.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 50) || "chat";

function asText() {
  const said = chat.messages.map(({ role, content }) => `**${role === "user" ? "You" : "Reply"}**\n\n${content}\n`);
  return [`# ${chat.title}\n`, ...said].join("\n");
}

function asJson() {
  const messages = chat.messages.map(({ role, content }) => ({ role, content }));
  return JSON.stringify({ title: chat.title, messages }, null, 2);
}

function askForKey() {
  $("key_form").hidden = false;
  $("key").focus();
}

async function takeKey(event) {
  event.preventDefault();
  store.saveKey($("key").value.trim());
  $("key").value = "";
  $("key_form").hidden = true;
  await showModel();
  if ($("key_form").hidden && chat.messages.at(-1)?.status === 401) does.retry(chat.messages.length - 1);
  else if ($("key_form").hidden) $("prompt").focus();
}

async function showModel() {
  try {
    $("model").textContent = (await (await ask("v1/models")).json()).data[0].id;
  } catch (error) {
    if (!(error instanceof ServerError) && !(error instanceof TypeError)) throw error;
    if (error.status === 401) askForKey();
    else $("model").textContent = "the server does not answer";
  }
}

$("form").onsubmit = event => {
  event.preventDefault();
  if (running.has(chat.id)) stop(chat);
  else send($("prompt").value.trim());
};
$("prompt").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send($("prompt").value.trim());
  } else if (event.key === "Escape") stop(chat);
};
for (const idea of document.querySelectorAll(".ideas button")) idea.onclick = () => send(idea.textContent);
$("fresh").onclick = fresh;
$("title").onchange = () => {
  chat.title = $("title").value.trim() || chat.title;
  if (chat.messages.length) store.saveChat(chat);
  showControls();
  listChats();
};
$("title").onkeydown = event => event.key === "Enter" && $("prompt").focus();
$("remove").onclick = remove;
$("export_text").onclick = () => save(`${fileName()}.md`, "text/markdown", asText());
$("export_json").onclick = () => save(`${fileName()}.json`, "application/json", asJson());
$("key_form").onsubmit = takeKey;
$("side_open").onclick = event => {
  event.stopPropagation();
  const isOpen = document.body.classList.toggle("side_open");
  $("side_open").setAttribute("aria-expanded", isOpen);
  if (isOpen) $("fresh").focus();
};
addEventListener("click", event => !event.target.closest("#side") && document.body.classList.remove("side_open"));
addEventListener("keydown", event => {
  if (event.key !== "Escape" || !document.body.classList.contains("side_open")) return;
  document.body.classList.remove("side_open");
  $("side_open").focus();
});
addEventListener("pagehide", () => {
  const left = [...running.keys()].map(id => open.get(id));
  for (const one of left) if (!one.removed) store.saveChat(one);
});
store.watchChats(id => {
  if (running.has(id)) return;
  open.delete(id);
  if (id === chat.id && store.chat(id)) show(found(id));
  else listChats();
});

if (!CSS.supports("field-sizing", "content")) {
  $("prompt").oninput = () => {
    $("prompt").style.height = "auto";
    $("prompt").style.height = `${$("prompt").scrollHeight}px`;
  };
}

startSettings(showModel);
const id = location.hash.slice(1);
show(id && store.chat(id) ? found(id) : chat);
showModel();
