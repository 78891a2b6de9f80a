// The settings, and the switch of the tree at work.

import * as store from "./store.js";
import { hide } from "./tree.js";

const $ = id => document.getElementById(id);
const { settings } = store;

/** Let the controls work. Args: changed: called when the settings have been changed, the key perhaps included. */
export function startSettings(changed) {
  $("settings_open").onclick = show;
  $("settings").onclose = () => {
    take();
    changed();
  };
  $("forget").onclick = forget;
  $("tree").onclick = () => {
    settings.tree = !settings.tree;
    store.saveSettings();
    hide();
    showTree();
  };
  showTree();
}

function show() {
  for (const name of ["temperature", "max_tokens", "theme"]) $(name).value = settings[name];
  $("settings_key").value = store.key();
  $("settings").showModal();
}

function take() {
  for (const name of ["temperature", "max_tokens"]) if ($(name).validity.valid) settings[name] = $(name).value;
  settings.theme = $("theme").value;
  store.saveSettings();
  store.saveKey($("settings_key").value.trim());
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
}

function forget() {
  if (!confirm("Delete all chats, settings and the key from this browser?")) return;
  store.forget();
  location.assign(location.pathname); // without the chat that was shown
}

function showTree() {
  document.body.classList.toggle("trees", settings.tree);
  $("tree").setAttribute("aria-checked", settings.tree);
  $("legend").hidden = !settings.tree;
}
