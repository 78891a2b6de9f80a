"""The parser gives advice, and has options that several commands share, whose defaults configuration classes set."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from manyheads.config import BUILTIN, ConfigError, EngineConfig
from manyheads.request import SamplingParams
from manyheads.sizes import parse_size

Run = Callable[[argparse.Namespace], int]
"""What runs a command takes the values of its options, and returns the exit status."""


def size(text: str) -> int:
    """Read a size in bytes, as the type of an option."""
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


ENGINE_HELP: dict[str, tuple[Callable[[str], Any], str]] = {
    "heads": (str, "Medusa heads or an EAGLE-3 drafter: a hub id or a folder (default: what comes with the model)"),
    "drafter": (
        str,
        "what guesses tokens: medusa or eagle3 (what --heads holds, or comes with the model), or ngram (what followed "
        "the same words earlier in the text, for any model; default: what there is)",
    ),
    "tokenizer": (str, "a local folder with another tokenizer (default: the model's)"),
    "speculative": (bool, "let a drafter guess tokens"),
    "dtype": (str, "auto, float32, bfloat16 or float16"),
    "quantization": (
        str,
        "round the weights of model and heads to fewer bits: int8, fp8, int4, bitsandbytes-8bit or bitsandbytes-4bit "
        "(default: as they come; quantized checkpoints are known by themselves)",
    ),
    "kv_cache_dtype": (str, "auto (as --dtype), or 8 bits for twice as many tokens: fp8 or int8"),
    "device": (str, "where the model runs"),
    "tensor_parallel_size": (int, "GPUs that share the model, each a part of every layer"),
    "max_model_len": (int, "longest sequence in tokens, prompt and output together (default: the checkpoint's)"),
    "max_num_seqs": (int, "most requests that run at once (default: 64 on a CPU, 256 on a GPU)"),
    "max_num_batched_tokens": (
        int,
        "most prompt tokens computed in one step (default: 1024 on a CPU, 2048 on a GPU)",
    ),
    "target_step_ms": (
        float,
        "most milliseconds that a step should take while replies are under way (default: its prompts take three "
        "times as long as the replies, or as long as the fewest prompts do)",
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
    "num_threads": (int, "CPU threads of the engine (default: as many as are fastest, measured again and again)"),
}
FLAGS = {"memory_bytes": "--memory"}
"""These options are not named like their fields."""
SAMPLING_HELP: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (int, "most output tokens (default: until the model stops)"),
    "max_steps": (int, "most decoding steps"),
    "temperature": (float, "0 is greedy (default: the model's, or 1)"),
    "top_p": (float, "keep the most likely tokens up to this probability (default: the model's, or 1)"),
    "top_k": (int, "keep this many of the most likely tokens; 0 keeps all (default: the model's, or 0)"),
    "min_p": (float, "keep tokens at least this likely relative to the most likely one (default: the model's, or 0)"),
    "repetition_penalty": (float, "over prompt and output; 1 is off (default: the model's, or 1)"),
    "presence_penalty": (float, "-2 to 2 (default: 0)"),
    "frequency_penalty": (float, "-2 to 2 (default: 0)"),
    "seed": (int, "for the same text again"),
    "acceptance": (str, "exact (the model's distribution; default) or typical (Medusa's own rule, a little faster)"),
}


class Parser(argparse.ArgumentParser):
    """A parser is argparse's, with advice: what is wrong, and what was probably meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.commands: dict[str, Parser] = {}
        self._adder: argparse._SubParsersAction[Parser] | None = None

    def add_command(self, name: str, summary: str, run: Run, example: str) -> Parser:
        """Add a command, and return the parser of its options."""
        self._adder = self._adder or self.add_subparsers(title="commands", dest="command", metavar="COMMAND")
        description = summary[:1].upper() + summary[1:] + "."
        command = self._adder.add_parser(name, help=summary, description=description, epilog=f"example: {example}")
        command.set_defaults(run=run)
        command.add_argument("--debug", action="store_true", help="show where an error comes from")
        self.commands[name] = command
        return command

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Return the options' values; an unknown option ends the program, with advice from its command."""
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
        """End with what is wrong, and where help is found or which command was probably meant."""
        if "invalid choice" in message and self.commands:
            word = message.split("'")[1]
            close = difflib.get_close_matches(word, self.commands, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(self.commands)}"
            message = f"unknown command {word!r}; {hint}"
        else:
            message += f"; see {self.prog} --help"
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_model(parser: Parser) -> None:
    """Add the model, as an argument without a flag, and its chat template."""
    parser.add_argument(
        "model", nargs="?", default=BUILTIN, help="a hub id, a local folder, a GGUF file, or builtin (default)"
    )
    parser.add_argument("--chat-template", help="a file, or vicuna (default: the model's)")


def add_engine(parser: Parser) -> None:
    """Add the fields of EngineConfig that the parser does not have yet."""
    group = parser.add_argument_group("engine")
    for field in fields(EngineConfig):
        if field.name in ENGINE_HELP and not _taken(parser, field.name):
            add_option(group, field.name, *ENGINE_HELP[field.name], field.default)


class AddAdapter(argparse.Action):
    """It reads NAME=PATH, as often as it is given, into one dictionary."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Add one. Ends the program if it has no name, or two have the same."""
        name, _, path = values.partition("=")
        there: dict[str, str] = getattr(namespace, self.dest)
        if not name or not path:
            parser.error(f"--lora must be NAME=PATH, not {values!r}")
        if name in there:
            parser.error(f"--lora: two adapters are called {name!r}")
        setattr(namespace, self.dest, {**there, name: path})


def add_answers(group: argparse._ArgumentGroup) -> None:
    """Add what everything that answers requests over HTTP may be told, wherever it runs."""
    group.add_argument("--api-key-file", metavar="FILE", help="keys by name, hashed; lines come from `manyheads key`")
    text = "the model's name in requests"
    group.add_argument("--served-model-name", action="append", default=[], dest="served_model_names", help=text)
    text = "how the model writes calls of functions: hermes, llama3_json, pythonic, mistral, deepseek_v3 or none"
    group.add_argument("--tool-parser", metavar="NAME", help=f"{text} (default: as its chat template has it)")
    text = "how it marks thoughts: think, mistral or none"
    group.add_argument("--reasoning-parser", metavar="NAME", help=f"{text} (default: as its chat template has it)")
    text = (
        "an adapter beside the model (LoRA in peft's format: a hub id or a folder), which requests name as their "
        "model; as many as wanted"
    )
    group.add_argument("--lora", action=AddAdapter, default={}, dest="loras", metavar="NAME=PATH", help=text)
    group.add_argument("--strict", action="store_true", help="refuse requests with fields that nobody knows")


def answer_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return fields of `ServerConfig`, by `add_answers` and `add_model`; those of adapters are the engine's."""
    names = ("api_key_file", "tool_parser", "reasoning_parser", "strict", "chat_template")
    return {name: getattr(args, name) for name in names} | {"served_model_names": tuple(args.served_model_names)}


def add_sampling(parser: Parser) -> None:
    """Add the fields of SamplingParams that every request may have."""
    group = parser.add_argument_group("sampling")
    for name, (kind, text) in SAMPLING_HELP.items():
        add_option(group, name, kind, text, None)
    group.add_argument("--stop", action="append", default=[], help="end before this text; may be given several times")


def add_option(
    group: argparse._ArgumentGroup,
    name: str,
    kind: Callable[[str], Any],
    text: str,
    default: Any,
    choices: tuple[str, ...] | None = None,
) -> None:
    """Add the option of a field; its help tells the default, unless that is None, no, or told by the text."""
    flag = FLAGS.get(name, "--" + name.replace("_", "-"))
    if default not in (None, MISSING) and default is not False and "(default" not in text:
        shown = "yes" if default is True else f"{default:g}" if isinstance(default, float) else default
        text += f" (default: {shown})"
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
    else:
        metavar = None if choices else "SIZE" if kind is size else name.upper()
        group.add_argument(flag, dest=name, type=kind, default=default, help=text, choices=choices, metavar=metavar)


def _taken(parser: Parser, name: str) -> bool:
    return any(a.dest == name for a in parser._actions)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Make the engine's configuration from the options."""
    return EngineConfig(**{f.name: getattr(args, f.name) for f in fields(EngineConfig) if hasattr(args, f.name)})


def sampling_options(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return those sampling parameters that the options give. Raises RequestError for a value out of its range."""
    given = {name: getattr(args, name) for name in SAMPLING_HELP if getattr(args, name) is not None}
    given |= {"stop": tuple(args.stop), **more}
    SamplingParams(**given).validate()
    return given
