"""`manyheads generate` answers prompts from a file or standard input, as JSON lines and in order."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from manyheads.cli.parser import Parser, add_engine, add_sampling, engine_config, sampling_options
from manyheads.config import BUILTIN, ConfigError
from manyheads.errors import RequestError
from manyheads.grammar import Grammar
from manyheads.interrupt import between_steps
from manyheads.request import SamplingParams

if TYPE_CHECKING:
    from manyheads.frontend.generation import Generation
    from manyheads.frontend.llm import LLM


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str


class _Line(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """This is one line of JSON input."""

    prompt: str | None = None
    messages: list[_Message] | None = None
    id: Any = None
    params: dict[str, Any] = {}


@dataclass
class Item:
    """An item is one prompt of the input, or what is wrong with it."""

    line: int
    echo: dict[str, Any]
    generation: Generation | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self.generation is None or self.generation.finished


def add_commands(parser: Parser) -> None:
    """Add `manyheads generate` to the program."""
    summary = "answer prompts from a file, as JSON lines"
    command = parser.add_command("generate", summary, run, "manyheads generate prompts.txt")
    command.add_argument(
        "input",
        nargs="?",
        default="-",
        help="a text file with a prompt on each line, or JSON lines (.jsonl) with `prompt` or `messages`, and "
        "`id` and `params` if wanted; - is standard input (default)",
    )
    command.add_argument("--format", choices=("auto", "txt", "jsonl"), default="auto", help="of the input")
    command.add_argument("--output", "-o", help="file for the answers (default: standard output)")
    command.add_argument("--raw", action="store_true", help="prompts are texts to continue, not instructions")
    command.add_argument("--n", type=int, default=1, help="answers per prompt (default: 1)")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="answers are JSON of the schema in this file")
    form.add_argument("--regex", help="answers are texts of this regular expression")
    command.add_argument("--quiet", "-q", action="store_true", help="no progress bar")
    command.add_argument("--model", default=BUILTIN, help="a hub id, a local folder, a GGUF file, or builtin (default)")
    command.add_argument("--chat-template", help="a file, or vicuna (default: the model's)")
    add_sampling(command)
    add_engine(command)


def run(args: argparse.Namespace) -> int:
    """Answer every line; return 1 if one of them could not be answered."""
    from manyheads.frontend.llm import LLM

    options = sampling_options(args, n=args.n, grammar=_grammar(args))
    lines = read_lines(args.input, args.format)
    if not lines:
        raise ConfigError("the input holds no prompt")
    llm = LLM(chat_template=args.chat_template, **_settings(args))
    params = msgspec.structs.replace(llm.defaults, **options)
    items = [_item(llm, number, parsed, params, args.raw) for number, parsed in lines]
    for item in items:
        if item.error is not None:
            print(f"line {item.line}: {item.error}", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        out: IO[str] = stack.enter_context(open(args.output, "w", encoding="utf-8")) if args.output else sys.stdout
        failed = write_answers(llm, items, out, progress=not args.quiet and sys.stderr.isatty())
    if failed:
        print(f"{failed} of {len(items)} lines have no answer; their records say why", file=sys.stderr)
    return 1 if failed else 0


def read_lines(name: str, form: str) -> list[tuple[int, _Line | str]]:
    """Return the lines that are not blank with their numbers, parsed, or what is wrong with them.

    Raises:
        ConfigError: the file is not there or not text.
    """
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}; give a file, or - for standard input") from error
    if form == "auto":
        first = data.lstrip()[:1]
        is_json = name.endswith((".jsonl", ".ndjson")) or (name == "-" and first == b"{")
        form = "jsonl" if is_json else "txt"
    lines: list[tuple[int, _Line | str]] = []
    for number, raw in enumerate(data.split(b"\n"), 1):
        if raw.strip():
            lines.append((number, _parse(raw.strip(b"\r"), form)))
    return lines


def write_answers(llm: LLM, items: list[Item], out: IO[str], *, progress: bool) -> int:
    """Write each answer as soon as all before it are written, and return the number of lines without one."""
    generations = [item.generation for item in items if item.generation is not None]
    failed = written = 0

    def flush() -> None:
        nonlocal failed, written
        before = written
        while written < len(items) and items[written].ended:
            records = list(_records(items[written]))
            failed += any("error" in record for record in records)
            for record in records:
                out.write(msgspec.json.encode(record).decode() + "\n")
            written += 1
        if written > before:
            out.flush()

    try:
        with between_steps() as check:
            for _ in llm.follow(generations, progress):
                flush()
                check()
        flush()
    except KeyboardInterrupt:
        print(f"stopped: {written} of {len(items)} lines are answered and written", file=sys.stderr)
        raise
    return failed


def _grammar(args: argparse.Namespace) -> Grammar | None:
    """Make the grammar that the options ask for."""
    if args.regex is not None:
        return Grammar("regex", args.regex)
    if args.json_schema is None:
        return None
    try:
        return Grammar("json", Path(args.json_schema).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--json-schema: cannot read {args.json_schema}: {error}") from error


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    config = engine_config(args)
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def _parse(raw: bytes, form: str) -> _Line | str:
    """Return a line of input, or what is wrong with it."""
    try:
        if form == "txt":
            return _Line(prompt=raw.decode("utf-8"))
        line = msgspec.json.decode(raw, type=_Line)
    except UnicodeDecodeError:
        return "not UTF-8"
    except msgspec.DecodeError as error:
        return f"not as expected: {error}"
    if (line.prompt is None) == (line.messages is None):
        return "needs either `prompt` or `messages`"
    return line


def _item(llm: LLM, number: int, parsed: _Line | str, params: SamplingParams, raw: bool) -> Item:
    if isinstance(parsed, str):
        return Item(number, {}, error=parsed)
    echo: dict[str, Any] = {} if parsed.id is None else {"id": parsed.id}
    if parsed.messages is not None:
        messages = [{"role": m.role, "content": m.content} for m in parsed.messages]
        echo["messages"] = messages
    else:
        assert parsed.prompt is not None
        messages = [{"role": "user", "content": parsed.prompt}]
        echo["prompt"] = parsed.prompt
    try:
        if parsed.params:
            given = {**msgspec.to_builtins(params, str_keys=True), **parsed.params}
            params = msgspec.convert(given, SamplingParams, str_keys=True)
        if parsed.prompt is not None and (raw or not llm.tokenizer.has_chat_template):
            return Item(number, echo, llm.prepare(parsed.prompt, params))
        if parsed.prompt is not None and not parsed.prompt.strip():
            raise RequestError("the prompt is empty")
        return Item(number, echo, llm.prepare_chat(messages, params))
    except (RequestError, msgspec.ValidationError) as error:
        return Item(number, echo, error=str(error))


def _records(item: Item) -> Iterable[dict[str, Any]]:
    if item.generation is None:
        yield {"line": item.line, **item.echo, "error": item.error}
        return
    for output in item.generation.result().outputs:
        record = {
            "line": item.line,
            **item.echo,
            "text": output.text,
            "finish_reason": output.finish_reason,
            "tokens": len(output.token_ids),
            "steps": output.num_steps,
        }
        if item.generation.params.n > 1:
            record["index"] = output.index
        if output.error is not None:
            record["error"] = output.error
        yield record
