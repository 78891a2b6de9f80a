"""The command's options. Defaults come from the configuration classes."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from manyheads.cli.heads_options import add_commands as add_heads_commands
from manyheads.config import BUILTIN, ConfigError, EngineConfig
from manyheads.request import SamplingParams
from manyheads.sizes import parse_size

DESCRIPTION = "Serves language models with Medusa heads to many people at once."


def size(text: str) -> int:
    """A size in bytes, as an option's type."""
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


ENGINE_HELP: dict[str, tuple[Callable[[str], Any], str]] = {
    "heads": (str, "Medusa heads: a hub id or a folder (default: those that come with the model)"),
    "speculative": (bool, "use the model's heads"),
    "dtype": (str, "auto, float32, bfloat16 or float16"),
    "quantization": (
        str,
        "round the weights of model and heads to fewer bits: int8, fp8, int4, bitsandbytes-8bit or bitsandbytes-4bit "
        "(default: as they come; quantized checkpoints are known by themselves)",
    ),
    "kv_cache_dtype": (str, "auto (as --dtype), or 8 bits for twice as many tokens: fp8 or int8"),
    "device": (str, "where the model runs"),
    "max_model_len": (int, "longest sequence in tokens, prompt and output together (default: the checkpoint's)"),
    "max_num_seqs": (int, "most requests that run at once (default: 64 on a CPU, 256 on a GPU)"),
    "max_num_batched_tokens": (
        int,
        "most prompt tokens computed in one step (half beside decoding rows; default: 1024 on a CPU, 2048 on a GPU)",
    ),
    "block_size": (int, "tokens in a page of the K/V cache"),
    "num_blocks": (int, "pages of the K/V cache (default: by the memory)"),
    "kv_cache_bytes": (size, "size of the K/V cache, such as 4GiB"),
    "memory_bytes": (size, "most memory to take in all, such as 15GiB; a GPU's, or the process's on a CPU"),
    "gpu_memory_utilization": (float, "share of a GPU's memory to take where --memory does not say"),
    "prefix_caching": (bool, "keep the K/V of prompts for later ones that begin the same"),
    "tree_size": (int, "nodes of a row's speculation tree, on average, 1 to 64 (default: chosen at each step)"),
    "max_queue": (int, "most requests that wait; more are rejected"),
    "seed": (int, "for requests that bring none (default: from the operating system)"),
    "num_threads": (int, "CPU threads of the engine (default: all cores; take fewer where others are busy)"),
}
FLAGS = {"memory_bytes": "--memory"}
"""Where an option is not named like its field."""
SAMPLING_HELP: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (int, "most output tokens (default: until the model stops)"),
    "max_steps": (int, "most decoding steps"),
    "temperature": (float, "0 is greedy"),
    "top_p": (float, "keep the most likely tokens up to this probability"),
    "top_k": (int, "keep this many of the most likely tokens; 0 keeps all"),
    "min_p": (float, "keep tokens at least this likely relative to the most likely one"),
    "repetition_penalty": (float, "over prompt and output; 1 is off"),
    "presence_penalty": (float, "-2 to 2"),
    "frequency_penalty": (float, "-2 to 2"),
    "seed": (int, "for the same text again"),
    "acceptance": (str, "exact (the model's distribution) or typical (Medusa's own rule, a little faster)"),
}


class Parser(argparse.ArgumentParser):
    """argparse with advice: what is wrong, and what was probably meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.commands: dict[str, Parser] = {}

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        args = list(sys.argv[1:] if args is None else args)
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = self.commands.get(getattr(parsed, "command", None) or "", self)
            command.unknown(unknown[0])
        return parsed

    def unknown(self, option: str) -> NoReturn:
        """End with what the option may have been meant to be."""
        name = option.split("=")[0]
        options = [o for a in self._actions for o in a.option_strings]
        close = difflib.get_close_matches(name, options, n=2, cutoff=0.6)
        hint = f"did you mean {' or '.join(close)}?" if close else f"see {self.prog} --help"
        kind = "option" if name.startswith("-") else "argument"
        self.exit(2, f"{self.prog}: error: unknown {kind} {name}; {hint}\n")

    def error(self, message: str) -> NoReturn:
        if "invalid choice" in message and self.commands:
            word = message.split("'")[1]
            close = difflib.get_close_matches(word, self.commands, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(self.commands)}"
            message = f"unknown command {word!r}; {hint}"
        else:
            message += f"; see {self.prog} --help"
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser() -> Parser:
    """The parser of the whole command."""
    parser = Parser(prog="manyheads", description=DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.set_defaults(run=lambda args: _version() if args.version else _usage(parser))
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    def add(name: str, summary: str, run: Callable[[argparse.Namespace], int], example: str) -> Parser:
        command: Parser = commands.add_parser(
            name,
            help=summary,
            description=summary[:1].upper() + summary[1:] + ".",
            epilog=f"example: {example}",
        )
        command.set_defaults(run=run)
        command.add_argument("--debug", action="store_true", help="show where an error comes from")
        parser.commands[name] = command
        return command

    _serve_options(add("serve", "serve a model over HTTP", _serve, "manyheads serve --port 8000"))
    _chat_options(add("chat", "chat with a model in the terminal", _chat, "manyheads chat --temperature 0.7"))
    _generate_options(
        add("generate", "answer prompts from a file, as JSON lines", _generate, "manyheads generate prompts.txt")
    )
    add_heads_commands(add)
    from manyheads.cli.bench import options as bench_options

    bench_options(add("bench", "load a server and report how it does", _bench, "manyheads bench users --users 1,4,16"))
    return parser


def _serve_options(parser: Parser) -> None:
    _add_model(parser)
    web = parser.add_argument_group("server")
    web.add_argument("--host", default="0.0.0.0", help="address to listen on (default: 0.0.0.0, all)")
    web.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    web.add_argument("--api-key", help="what requests must bring (default: $MANYHEADS_API_KEY, if set)")
    web.add_argument("--served-model-name", action="append", default=[], help="the model's name in requests")
    web.add_argument("--cors-origin", action="append", default=[], help="origin whose pages may call; * is any")
    web.add_argument("--max-body-bytes", type=int, help="largest body of a request (default: 4 MiB)")
    web.add_argument("--access-log", action="store_true", help="log every request")
    web.add_argument("--verbose", action="store_true", help="tell what the engine does while it starts")
    _add_engine(parser)


def _chat_options(parser: Parser) -> None:
    _add_model(parser)
    parser.add_argument("--url", help="talk to a running server instead, such as http://127.0.0.1:8000")
    parser.add_argument("--api-key", help="for --url (default: $MANYHEADS_API_KEY, if set)")
    parser.add_argument("--system", help="system message")
    _add_sampling(parser)
    _add_engine(parser)


def _generate_options(parser: Parser) -> None:
    parser.add_argument(
        "input",
        nargs="?",
        default="-",
        help="a text file with a prompt on each line, or JSON lines (.jsonl) with `prompt` or `messages`, and "
        "`id` and `params` if wanted; - is standard input (default)",
    )
    parser.add_argument("--format", choices=("auto", "txt", "jsonl"), default="auto", help="of the input")
    parser.add_argument("--output", "-o", help="file for the answers (default: standard output)")
    parser.add_argument("--raw", action="store_true", help="prompts are texts to continue, not instructions")
    parser.add_argument("--n", type=int, default=1, help="answers per prompt (default: 1)")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress bar")
    parser.add_argument("--model", default=BUILTIN, help="a hub id, a local folder, or builtin (default)")
    parser.add_argument("--chat-template", help="a file, or vicuna (default: the model's)")
    _add_sampling(parser)
    _add_engine(parser)


def _add_model(parser: Parser) -> None:
    parser.add_argument("model", nargs="?", default=BUILTIN, help="a hub id, a local folder, or builtin (default)")
    parser.add_argument("--chat-template", help="a file, or vicuna (default: the model's)")


def _add_engine(parser: Parser) -> None:
    group = parser.add_argument_group("engine")
    for field in fields(EngineConfig):
        if field.name in ENGINE_HELP and not _taken(parser, field.name):
            _add(group, field.name, *ENGINE_HELP[field.name], field.default, "")


def _add_sampling(parser: Parser) -> None:
    group = parser.add_argument_group("sampling")
    defaults = SamplingParams()
    for name, (kind, text) in SAMPLING_HELP.items():
        _add(group, name, kind, text, getattr(defaults, name), "")
    group.add_argument("--stop", action="append", default=[], help="end before this text; may be given several times")


def _add(
    group: argparse._ArgumentGroup, name: str, kind: Callable[[str], Any], text: str, default: Any, prefix: str
) -> None:
    flag = FLAGS.get(name, "--" + prefix + name.replace("_", "-"))
    if default not in (None, MISSING) and "(default" not in text:
        text += f" (default: {'yes' if default is True else default})"
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
    else:
        metavar = "SIZE" if kind is size else name.upper()
        group.add_argument(flag, dest=name, type=kind, default=default, help=text, metavar=metavar)


def _taken(parser: Parser, name: str) -> bool:
    return any(a.dest == name for a in parser._actions)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's configuration from the options."""
    return EngineConfig(**{f.name: getattr(args, f.name) for f in fields(EngineConfig)})


def sampling_params(args: argparse.Namespace, **more: Any) -> SamplingParams:
    """Sampling parameters from the options."""
    given = {name: getattr(args, name) for name in SAMPLING_HELP}
    return SamplingParams(**given, stop=tuple(args.stop), **more).validate()


def _version() -> int:
    from importlib.metadata import version

    print(f"manyheads {version('manyheads')}")
    return 0


def _usage(parser: Parser) -> int:
    parser.print_help(sys.stderr)
    return 2


def _serve(args: argparse.Namespace) -> int:
    from manyheads.cli.serve import run

    return run(args)


def _chat(args: argparse.Namespace) -> int:
    from manyheads.cli.chat import run

    return run(args)


def _generate(args: argparse.Namespace) -> int:
    from manyheads.cli.generate import run

    return run(args)


def _bench(args: argparse.Namespace) -> int:
    from manyheads.cli.bench import run

    return run(args)
