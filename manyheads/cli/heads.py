"""`manyheads inspect` says what a checkpoint of heads is, `manyheads convert` writes it in another format."""

from __future__ import annotations

import argparse
from pathlib import Path

from manyheads.cli.parser import Parser
from manyheads.config import BUILTIN, ConfigError

FORMATS = ("manyheads", "reference", "reference-full", "tgi", "vllm")
"""`convert` writes these formats."""


def add_commands(parser: Parser) -> None:
    """Add `manyheads inspect` and `manyheads convert` to the program."""
    summary = "say what a checkpoint of heads is"
    inspect = parser.add_command("inspect", summary, run_inspect, "manyheads inspect builtin")
    inspect.add_argument("heads", help="a folder or a hub id")
    inspect.add_argument("--base", help="the base model (default: the one that the heads name)")
    example = "manyheads convert builtin heads-for-vllm --to vllm"
    convert = parser.add_command("convert", "write heads in another format", run_convert, example)
    convert.add_argument("heads", help="a folder or a hub id")
    convert.add_argument("out", help="folder to write; must not be there, or empty")
    convert.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    convert.add_argument("--base", help="the base model, to be named and read (default: the one that the heads name)")
    convert.add_argument(
        "--expand",
        action="store_true",
        help="write out in full what the format cannot hold: a copy of a shared projection for every head, rows of "
        "zeros for tokens that the heads leave out",
    )


def run_inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint is; return 1 if something is wrong with it."""
    from manyheads.speculation.medusa.inspect import inspect_heads

    report = inspect_heads(args.heads, args.base)
    width = max(map(len, report.facts))
    for name, value in report.facts.items():
        print(f"{name:{width}}  {value}")
    for problem in report.problems:
        print(f"{'problem':{width}}  {problem}")
    return 1 if report.problems else 0


def run_convert(args: argparse.Namespace) -> int:
    """Read heads of any format and write them in another."""
    from manyheads.checkpoint import resolve
    from manyheads.models.registry import read_config
    from manyheads.speculation.medusa.checkpoint import STATISTICS, locate_heads, read_heads, vocab_size
    from manyheads.speculation.medusa.export import read_projection, write_full, write_heads

    folder, named = locate_heads(args.heads)
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and not empty; give another folder")
    base = args.base or named
    if base is not None and base != BUILTIN and Path(base).is_dir():
        base = str(Path(base).resolve())
    local = base is not None and (base == BUILTIN or Path(base).is_dir())
    config = read_config(resolve(base)) if base is not None and local else None
    weights = read_heads(folder, config)
    statistics = folder / STATISTICS
    if args.to == "reference-full":
        if base is None:
            raise ConfigError("reference-full holds the base model too, and these heads name none; give --base")
        write_full(weights, resolve(base), out, statistics=statistics, expand=args.expand)
    else:
        write_heads(
            weights,
            out,
            args.to,
            base=str(resolve(base)) if base == BUILTIN and args.to != "manyheads" else base,
            vocab_size=config.vocab_size if config is not None else vocab_size(weights, folder),
            statistics=statistics,
            base_projection=None if base is None else lambda: read_projection(resolve(base)),
            expand=args.expand,
        )
    print(f"{len(weights.blocks)} heads ({weights.format}) written to {out} ({args.to})")
    return 0
