// The dashboard: reads /metrics every two seconds, and keeps what it has read for five minutes.

import { ask, ServerError } from "./api.js";
import { growth, quantile, Reading } from "./metrics.js";
import { drawLines, fillTable, format } from "./plot.js";
import { key, saveKey } from "./store.js";

const $ = id => document.getElementById(id);
const EVERY = 2000, KEPT = 300_000;
const readings = [];
const nodes = new Map(); // by load: [sum of trees' nodes, how often]
const LOADS = [1, 2, 4, 8, 16, 32, 64, 128, 256, Infinity];

async function read() {
  try {
    const text = await (await ask("metrics")).text();
    const now = new Reading(text, performance.now());
    if (readings.length) count(readings.at(-1), now);
    readings.push(now);
    while (readings[0].at < now.at - KEPT) readings.shift();
    show();
    await showState();
  } catch (error) {
    if (error.status === 401) return askForKey();
    if (!(error instanceof TypeError || error instanceof ServerError)) throw error;
    state(error instanceof TypeError ? "The server does not answer." : error.message, true);
  }
  setTimeout(read, EVERY);
}

async function showState() {
  try {
    await ask("ready");
    state("ready", false);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    state(error.message, true);
  }
}

function state(text, isBad) {
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").classList.toggle("bad", isBad);
}

/** Remember how large trees were, if any were drafted since the reading before. */
function count(before, now) {
  const users = now.get("num_requests_running");
  if (!users || !growth(before, now, "decoding_row_steps_total")) return;
  const load = LOADS.find(most => users <= most);
  const [sum, times] = nodes.get(load) ?? [0, 0];
  nodes.set(load, [sum + now.get("tree_size"), times + 1]);
}

function show() {
  const now = readings.at(-1), first = readings[0];
  const rates = readings.slice(1).map((reading, i) => ({
    at: reading.at,
    rate: (1000 * growth(readings[i], reading, "generation_tokens_total")) / (reading.at - readings[i].at),
  }));
  const recent = readings.findLast(reading => reading.at < now.at - 8000) ?? first;
  const seconds = (now.at - recent.at) / 1000;
  const tokens = growth(recent, now, "generation_tokens_total");
  const steps = growth(recent, now, "decoding_row_steps_total");
  const waits = now.get("queue_wait_seconds");
  const number = name => format(now.get(name));
  showNumbers([
    ["Running", number("num_requests_running"), "requests at once"],
    ["Waiting", number("num_requests_waiting"), waits ? `a new one would wait ${format(waits)} s` : "no wait"],
    ["Tokens a second", seconds ? format(tokens / seconds) : "–", seconds ? `over ${Math.round(seconds)} s` : ""],
    ["Tokens a step", steps ? (tokens / steps).toFixed(1) : "–", `${number("tokens_per_step")} since the start`],
    ["K/V in use", percent(now.get("kv_cache_usage_perc")), `of ${number("kv_cache_tokens")} tokens`],
    ["Restarts", number("engine_restarts_total"), `${number("requests_resumed_total")} requests resumed`],
  ]);
  const width = Math.min(KEPT, Math.max(60_000, now.at - first.at)), x = at => 1 - (now.at - at) / width;
  const span = width < 120_000 ? `${Math.round(width / 1000)} s` : `${format(width / 60_000)} min`;
  const rate = { kind: "first", label: "tokens a second", points: rates.map(({ at, rate }) => [x(at), rate]) };
  drawLines($("rate"), [rate], span);
  const line = (kind, label, name) => ({ kind, label, points: readings.map(r => [x(r.at), r.get(name)]) });
  const users = [line("second", "waiting", "num_requests_waiting"), line("first", "running", "num_requests_running")];
  drawLines($("users"), users, span);
  showTables(now, first);
}

function showNumbers(numbers) {
  const list = $("numbers");
  if (!list.children.length) {
    for (const [name] of numbers) {
      const part = list.appendChild(document.createElement("div"));
      part.append(document.createElement("dt"), document.createElement("dd"));
      part.firstChild.textContent = name;
      part.lastChild.append("", document.createElement("small"));
    }
  }
  numbers.forEach(([, value, note], i) => {
    const [text, small] = list.children[i].lastChild.childNodes;
    text.data = value;
    small.textContent = note;
  });
}

function showTables(now, first) {
  const depths = now.all("spec_decode_drafted_by_depth_total").map(([depth, drafted]) => {
    const right = now.get("spec_decode_accepted_by_depth_total", depth);
    return [depth, drafted ? right / drafted : 0, drafted ? percent(right / drafted) : "–", `of ${format(drafted)}`];
  });
  const [drafter] = now.all("drafter_info")[0] ?? ["nothing"];
  fillTable($("depth"), depths, drafter === "nothing" ? "Nothing guesses tokens here." : "Nothing was guessed yet.");
  const most = Math.max(...[...nodes.values()].map(([sum, times]) => sum / times));
  const loads = LOADS.filter(load => nodes.has(load)).map(load => {
    const [sum, times] = nodes.get(load), low = (LOADS[LOADS.indexOf(load) - 1] ?? 0) + 1;
    const name = load === Infinity ? `over ${low - 1}` : low === load ? `${load}` : `${low}–${load}`;
    return [name, sum / times / most, (sum / times).toFixed(1)];
  });
  fillTable($("load"), loads, "Nobody has been served since.");
  const time = (name, metric) => {
    const [half, nearly] = [0.5, 0.95].map(share => quantile(first, now, metric, share));
    return half === null ? [] : [[name, null, milliseconds(half), milliseconds(nearly)]];
  };
  const times = [
    ...time("to the first token", "time_to_first_token_seconds"),
    ...time("between tokens", "inter_token_latency_seconds"),
    ...time("whole reply", "e2e_request_latency_seconds"),
  ];
  fillTable($("times"), times, "No reply since.", times.length ? ["", "half within", "95 % within"] : null);
  showMemory(now);
  const replicas = now.all("engine_requests_running").map(([name, running]) => [
    name, null, format(running), format(now.get("engine_requests_waiting", name)),
    format(now.get("engine_generation_tokens_total", name)),
  ]);
  $("engines_part").hidden = !replicas.length;
  fillTable($("engines"), replicas, "", ["", "running", "waiting", "tokens"]);
}

function showMemory(now) {
  const names = { weights: "weights", heads: "heads", kv_cache: "K/V cache", graphs: "graphs", rest: "the rest" };
  const parts = now.all("memory_bytes").filter(([, bytes]) => bytes);
  const all = parts.reduce((sum, [, bytes]) => sum + bytes, 0);
  $("memory_note").textContent = `The engine takes ${inBytes(all)} in all.`;
  const rows = parts.map(([kind, bytes]) => [names[kind] ?? kind, bytes / all, inBytes(bytes)]);
  fillTable($("memory"), rows, "Not known.");
}

const percent = share => `${format(100 * share)} %`;
const inBytes = bytes => (bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : `${format(bytes / 2 ** 20)} MiB`);
const milliseconds = seconds => (seconds < 1 ? `${format(1000 * seconds)} ms` : `${seconds.toFixed(1)} s`);

function askForKey() {
  state(key() ? "The server does not take this key." : "", Boolean(key()));
  $("key_form").hidden = false;
  $("key").focus();
}

async function showModel() {
  try {
    const [model] = (await (await ask("v1/models")).json()).data;
    const drafters = { medusa: `${model.num_medusa_heads} Medusa heads`, eagle3: "EAGLE-3", ngram: "n-grams" };
    $("model").textContent = [model.id, drafters[model.drafter]].filter(Boolean).join(" · ");
  } catch (error) {
    if (!(error instanceof ServerError || error instanceof TypeError)) throw error;
    $("model").textContent = "";
  }
}

$("key_form").onsubmit = event => {
  event.preventDefault();
  saveKey($("key").value.trim());
  $("key").value = "";
  $("key_form").hidden = true;
  showModel();
  read();
};
showModel();
read();
