// What this browser keeps: chats, settings and the API key. Nothing of it leaves the browser but in requests to the
// server that the page came from.

const PLACE = "manyheads" + new URL("../", import.meta.url).pathname; // of several servers behind one host, this one
const CHAT = PLACE + "chat.";
let isForgotten = false;

export const settings = { temperature: "", max_tokens: "", tree: true, theme: "", ...read(PLACE + "settings") };

function read(name) {
  const text = localStorage.getItem(name);
  return text === null ? null : JSON.parse(text);
}

/** Keep something; false if the browser has no room for it. */
function write(name, value) {
  if (isForgotten) return true;
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch (error) {
    if (error.name === "QuotaExceededError") return false;
    throw error;
  }
}

export const saveSettings = () => write(PLACE + "settings", settings);
export const key = () => read(PLACE + "key") ?? "";
export const saveKey = value => (value ? write(PLACE + "key", value) : localStorage.removeItem(PLACE + "key"));

/** All chats, the latest first. */
export function chats() {
  const names = Object.keys(localStorage).filter(name => name.startsWith(CHAT));
  return names.map(read).sort((a, b) => b.updated - a.updated);
}

export const chat = id => read(CHAT + id);
export const saveChat = chat => write(CHAT + chat.id, chat);
export const removeChat = id => localStorage.removeItem(CHAT + id);

/** A chat that is not kept before something is said in it. */
export function newChat(messages = [], title = "") {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(8)), byte => byte.toString(16).padStart(2, "0")).join("");
  return { id, title, updated: Date.now(), messages };
}

/** Call `changed` with the id of a chat that another tab has changed or removed. */
export function watchChats(changed) {
  addEventListener("storage", event => {
    if (event.key === null) changed(null);
    else if (event.key.startsWith(CHAT)) changed(event.key.slice(CHAT.length));
  });
}

/** Forget all that is kept, and keep nothing more until the page is loaded again. */
export function forget() {
  isForgotten = true;
  for (const name of Object.keys(localStorage)) if (name.startsWith(PLACE)) localStorage.removeItem(name);
}
