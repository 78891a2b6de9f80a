"""`manyheads chat` is a conversation in the terminal, with a model in this process or on a server."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from manyheads.cli.parser import Parser, add_engine, add_model, add_sampling, engine_config, sampling_options
from manyheads.config import ConfigError
from manyheads.errors import RequestError
from manyheads.interrupt import between_steps

if TYPE_CHECKING:
    import http.client
    import urllib.error

HELP = "/exit ends, /clear forgets the conversation, Ctrl-C stops a reply"


@dataclass
class Piece:
    """A piece of a reply is new text, with the counts so far if they are known."""

    text: str = ""
    num_tokens: int = 0
    num_steps: int = 0


Ask = Callable[[list[dict[str, str]]], Iterator[Piece]]


def add_commands(parser: Parser) -> None:
    """Add `manyheads chat` to the program."""
    command = parser.add_command("chat", "chat with a model in the terminal", run, "manyheads chat --temperature 0.7")
    add_model(command)
    command.add_argument("--url", help="talk to a running server instead, such as http://127.0.0.1:8000")
    command.add_argument("--api-key", help="for --url (default: $MANYHEADS_API_KEY, if set)")
    command.add_argument("--system", help="system message")
    add_sampling(command)
    add_engine(command)


def run(args: argparse.Namespace) -> int:
    """Chat until /exit or the end of the input."""
    options = sampling_options(args)
    ask, name = _remote(args, options) if args.url else _local(args, options)
    return converse(ask, name, args.system)


def converse(ask: Ask, name: str, system: str | None = None) -> int:
    """Read what the user says, answer it, and remember both, until the end of the input; return the exit status."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
    print(f"chatting with {name} - {HELP}", file=sys.stderr)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        if text in ("/exit", "/quit"):
            return 0
        if text == "/clear":
            messages = list(start)
        elif text.startswith("/"):
            print(HELP, file=sys.stderr)
        elif text:
            messages.append({"role": "user", "content": text})
            reply = _reply(ask, messages)
            if reply is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": reply})


def _reply(ask: Ask, messages: list[dict[str, str]]) -> str | None:
    """Print a reply as it comes, and return it, or None if there is none."""
    parts: list[str] = []
    last = Piece()
    begin = time.perf_counter()
    pieces = ask(messages)
    try:
        for piece in pieces:
            parts.append(piece.text)
            print(piece.text, end="", flush=True)
            last = piece if piece.num_tokens else last
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except RequestError as error:
        print(f"error: {error}\n(/clear begins a new conversation)", file=sys.stderr)
        return None
    finally:
        if isinstance(pieces, Iterator) and hasattr(pieces, "close"):
            pieces.close()
    print()
    seconds = time.perf_counter() - begin
    if last.num_tokens:
        counts = f"{last.num_tokens} tokens, {last.num_tokens / seconds:.0f} tokens/s"
        if last.num_steps:
            counts += f", {last.num_tokens / last.num_steps:.2f} tokens/step"
        dim, plain = ("\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "")
        print(f"{dim}[{counts}]{plain}", file=sys.stderr)
    return "".join(parts)


def _local(args: argparse.Namespace, options: dict[str, Any]) -> tuple[Ask, str]:
    from manyheads.frontend.llm import LLM

    config = engine_config(args)
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
    print(f"loading {config.model} ...", file=sys.stderr)
    llm = LLM(chat_template=args.chat_template, **settings)
    params = msgspec.structs.replace(llm.defaults, **options)

    def ask(messages: list[dict[str, str]]) -> Iterator[Piece]:
        shown = 0
        with between_steps() as check:
            for result in llm.stream_chat(messages, params):
                output = result.outputs[0]
                if output.error is not None:
                    raise RequestError(output.error)
                yield Piece(output.text[shown:], len(output.token_ids), output.num_steps)
                shown = len(output.text)
                check()

    return ask, llm.engine.ready.model


def _remote(args: argparse.Namespace, options: dict[str, Any]) -> tuple[Ask, str]:
    import urllib.error
    import urllib.request

    url = args.url.rstrip("/").removesuffix("/v1")
    key = args.api_key or os.environ.get("MANYHEADS_API_KEY")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def call(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(url + path, data, headers))
        except urllib.error.HTTPError as error:
            raise RequestError(_message(error)) from error
        except (urllib.error.URLError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ConfigError(f"no answer from {url}: {reason}; is the server running?") from error

    try:
        with call("/v1/models") as response:
            name = str(json.load(response)["data"][0]["id"])
    except (RequestError, ConfigError):
        raise
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{url} answers, but not as this API does; is --url right?") from error

    def ask(messages: list[dict[str, str]]) -> Iterator[Piece]:
        body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}, **options}
        with call("/v1/chat/completions", body) as response:
            for line in _lines(response):
                data = line.removeprefix(b"data: ").strip()
                if not line.startswith(b"data: ") or data == b"[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RequestError(event["error"]["message"])
                usage = event.get("usage") or {}
                text = "".join(c["delta"].get("content") or "" for c in event["choices"])
                yield Piece(text, usage.get("completion_tokens", 0), usage.get("decoding_steps", 0))

    return ask, f"{name} at {url}"


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    import http.client

    try:
        yield from response
    except (OSError, http.client.HTTPException) as error:
        raise RequestError("the server broke the connection off") from error


def _message(error: urllib.error.HTTPError) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.load(error)["error"]["message"])
    return f"the server answered {error.code}"
