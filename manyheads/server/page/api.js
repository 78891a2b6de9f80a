// Requests to the server that the page came from, with the API key if there is one.

import { key } from "./store.js";

const ROOT = new URL("../", import.meta.url);

/** What the server says is wrong; `status` is HTTP's. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Ask for a path: with a body by POST, else by GET. Throws ServerError for any answer but 200. */
export async function ask(path, body, signal) {
  const headers = key() ? { Authorization: `Bearer ${key()}` } : {};
  const options = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  const response = await fetch(new URL(path, ROOT), options);
  if (response.ok) return response;
  const text = await response.text();
  let message = `The server answers ${response.status}.`;
  if (response.headers.get("content-type")?.startsWith("application/json")) message = JSON.parse(text).error.message;
  throw new ServerError(message, response.status);
}

/** The events of a stream. Throws ServerError for one that says what went wrong. */
export async function* events(response) {
  let rest = "";
  for await (const part of parts(response.body.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + part).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ServerError(event.error.message, 200);
      yield event;
    }
  }
  throw new TypeError("the stream ended early");
}

async function* parts(stream) { // not every browser's streams can be iterated over
  const reader = stream.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
}
