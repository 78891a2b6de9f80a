// Replies as they come: what of a chat the model is told, and what it answers. Nothing here knows of the page.
//
// A reply is a message: role, content, thoughts, and
//   runs    of each step: [tokens, characters of thoughts, characters of content]
//   stats   tokens, steps, wait (ms until the first token), ms and timed (the time after it, and tokens in that)
//   end     how it ended: stop, length, stopped, error
//   error, status   what was wrong, and HTTP's status
//   fills   whether the context is full where it is cut off, not the limit of a reply reached
//   unseen  how many of the first messages the model was not told, for want of room

import { ask, events, ServerError } from "./api.js";
import { saveChat, settings } from "./store.js";

export const running = new Map(); // chat id → AbortController
const guesses = new WeakMap(); // reply → guesses of each run; only for as long as the page is there

export const guessesOf = reply => guesses.get(reply) ?? [];
export const newReply = () => ({ role: "assistant", content: "", thoughts: "", runs: [], stats: null, end: null });

const SAVE_MS = 1000;
let isLeft = false; // a page that is left has its requests broken off, which is no failure
addEventListener("pagehide", () => (isLeft = true));
addEventListener("pageshow", () => (isLeft = false));
const plain = ({ role, content }) => ({ role, content });

/** Answer a chat whose last message is a reply, empty or to be gone on with.
 *
 * told: called whenever the reply has changed, and with false if it could not be kept.
 */
export async function answer(chat, told) {
  const reply = chat.messages.at(-1);
  const control = new AbortController();
  running.set(chat.id, control);
  Object.assign(reply, { end: null, error: undefined, status: undefined });
  reply.stats ??= { tokens: 0, steps: 0, wait: 0, ms: 0, timed: 0 };
  if (!guesses.has(reply)) guesses.set(reply, reply.runs.map(() => null));
  let saved = 0;
  const keep = () => {
    saved = performance.now();
    if (!saveChat(chat)) told(false);
  };
  keep();
  told();
  try {
    const request = await fit(chat, control.signal);
    const before = { ...reply.stats }, start = performance.now();
    let first = null, firstTokens = 0;
    for await (const event of events(await ask("v1/chat/completions", request, control.signal))) {
      const now = performance.now(), choice = event.choices[0];
      if (choice) add(reply, choice);
      const usage = event.usage;
      if (usage?.completion_tokens) {
        if (first === null) [first, firstTokens] = [now, usage.completion_tokens];
        reply.stats = {
          tokens: before.tokens + usage.completion_tokens,
          steps: before.steps + usage.decoding_steps,
          wait: before.wait || first - start,
          ms: before.ms + now - first,
          timed: before.timed + usage.completion_tokens - firstTokens,
        };
      }
      if (now - saved > SAVE_MS) keep();
      told();
    }
  } catch (error) {
    if (isLeft) return;
    if (error.name === "AbortError") reply.end = "stopped";
    else Object.assign(reply, { end: "error", ...why(error) });
  }
  running.delete(chat.id);
  if (chat.removed) return;
  chat.updated = Date.now();
  keep();
  told();
}

export const stop = chat => running.get(chat.id)?.abort();

function add(reply, choice) {
  const thoughts = choice.delta.reasoning_content ?? "", content = choice.delta.content ?? "";
  reply.thoughts += thoughts;
  reply.content += content;
  const step = choice.steps?.[0];
  if (step || thoughts || content) {
    reply.runs.push([step?.num_tokens ?? 0, thoughts.length, content.length]);
    guesses.get(reply).push(step?.guesses ?? null);
  }
  reply.end = choice.finish_reason ?? reply.end;
}

function why(error) {
  if (error instanceof ServerError) return { error: error.message, status: error.status };
  if (error instanceof TypeError) return { error: "The connection to the server was lost.", status: 0 };
  throw error;
}

/** The request for a reply, without the first messages where the context has no room for them. */
async function fit(chat, signal) {
  const reply = chat.messages.at(-1), continues = reply.content !== "";
  const told = chat.messages.slice(0, continues ? undefined : -1);
  const starts = told.flatMap((message, i) => (message.role === "user" ? [i] : []));
  const limit = Number(settings.max_tokens) || Infinity;
  let room = 0;
  const fits = async start => {
    const { count, context } = await measure(told.slice(start), signal);
    room = context - count;
    // so that a reply is not cut off after a few words while there is something to leave out
    return room >= (start === starts.at(-1) ? 1 : Math.min(limit, 256, context / 4));
  };
  let low = 0, high = starts.length - 1; // the first of the starts that fits lies between them
  if (!(await fits(starts[0]))) {
    for (low = 1; low < high; ) {
      const middle = (low + high) >> 1;
      if (await fits(starts[middle])) high = middle;
      else low = middle + 1;
    }
    if (low > high || !(await fits(starts[low]))) {
      const what = continues ? "The reply fills" : "This message alone does not fit into";
      throw new ServerError(`${what} the model's context. ${continues ? "Ask" : "Shorten it, and ask"} again.`, 400);
    }
  }
  reply.unseen = starts[low];
  reply.fills = room < limit;
  const request = {
    messages: told.slice(starts[low]).map(plain),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    return_steps: true,
    max_tokens: Math.min(limit, room),
  };
  if (settings.temperature !== "") request.temperature = Number(settings.temperature);
  if (continues) Object.assign(request, { continue_final_message: true, add_generation_prompt: false });
  return request;
}

/** How many tokens messages take, and how many the context holds. */
async function measure(messages, signal) {
  try {
    const found = await (await ask("tokenize", { messages: messages.map(plain) }, signal)).json();
    return { count: found.count, context: found.max_model_len };
  } catch (error) {
    if (error.status === 400 && error.message.includes("cannot fit")) return { count: Infinity, context: 0 };
    throw error;
  }
}
