"""`manyheads inspect` says what a checkpoint of heads or of a drafter is; `convert` writes it in another format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from manyheads.cli.parser import Parser
from manyheads.config import BUILTIN, ConfigError

if TYPE_CHECKING:
    from manyheads.models.config import ModelConfig

FORMATS = ("manyheads", "reference", "reference-full", "tgi", "vllm")
"""`convert` writes Medusa heads in these formats."""
EAGLE3_FORMATS = ("safeailab", "specforge", "speculators")
"""`convert` writes EAGLE-3 drafters in these formats."""


def add_commands(parser: Parser) -> None:
    """Add `manyheads inspect` and `manyheads convert` to the program."""
    summary = "say what a checkpoint of heads or of a drafter is"
    inspect = parser.add_command("inspect", summary, run_inspect, "manyheads inspect builtin")
    inspect.add_argument("heads", help="a folder or a hub id")
    inspect.add_argument("--base", help="the base model (default: the one that the heads name)")
    example = "manyheads convert builtin heads-for-vllm --to vllm"
    convert = parser.add_command("convert", "write heads or a drafter in another format", run_convert, example)
    convert.add_argument("heads", help="a folder or a hub id")
    convert.add_argument("out", help="folder to write; must not be there, or empty")
    convert.add_argument("--to", required=True, choices=FORMATS + EAGLE3_FORMATS, help="format to write")
    convert.add_argument("--base", help="the base model, to be named and read (default: the one that the heads name)")
    convert.add_argument(
        "--expand",
        action="store_true",
        help="write out in full what the format cannot hold: a copy of a shared projection for every head, rows of "
        "zeros for tokens that the heads leave out",
    )


def run_inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint is; return 1 if something is wrong with it."""
    from manyheads.speculation.eagle3.checkpoint import is_eagle3
    from manyheads.speculation.eagle3.inspect import inspect_drafter
    from manyheads.speculation.medusa.checkpoint import locate_heads
    from manyheads.speculation.medusa.inspect import inspect_heads

    folder, named = locate_heads(args.heads)
    is_drafter = is_eagle3(folder)
    report = inspect_drafter(folder, args.base or named) if is_drafter else inspect_heads(args.heads, args.base)
    width = max(map(len, report.facts))
    for name, value in report.facts.items():
        print(f"{name:{width}}  {value}")
    for problem in report.problems:
        print(f"{'problem':{width}}  {problem}")
    return 1 if report.problems else 0


def run_convert(args: argparse.Namespace) -> int:
    """Read heads or a drafter of any format and write them in another."""
    from manyheads.checkpoint import resolve
    from manyheads.models.registry import read_config
    from manyheads.speculation.eagle3.checkpoint import is_eagle3
    from manyheads.speculation.medusa.checkpoint import locate_heads

    folder, named = locate_heads(args.heads)
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and not empty; give another folder")
    base = args.base or named
    if base is not None and base != BUILTIN and Path(base).is_dir():
        base = str(Path(base).resolve())
    local = base is not None and (base == BUILTIN or Path(base).is_dir())
    config = read_config(resolve(base)) if base is not None and local else None
    write = _convert_drafter if is_eagle3(folder) else _convert_heads
    written = write(args, folder, out, base, config)
    print(f"{written} written to {out} ({args.to})")
    return 0


def _convert_drafter(
    args: argparse.Namespace, folder: Path, out: Path, base: str | None, config: ModelConfig | None
) -> str:
    """Write an EAGLE-3 drafter and say what was written."""
    from manyheads.checkpoint import resolve
    from manyheads.speculation.eagle3.checkpoint import read_drafter
    from manyheads.speculation.eagle3.export import write_drafter
    from manyheads.speculation.medusa.checkpoint import STATISTICS

    if args.to not in EAGLE3_FORMATS:
        raise ConfigError(f"{folder} holds an EAGLE-3 drafter; its formats are {', '.join(EAGLE3_FORMATS)}")
    if args.expand:
        raise ConfigError("--expand is for Medusa heads; a drafter is written as it is, or refused")
    weights = read_drafter(folder, config)
    if base == BUILTIN and args.to == "speculators":
        base = str(resolve(base))
    write_drafter(weights, out, args.to, base=base, model=config, statistics=folder / STATISTICS)
    return f"EAGLE-3 drafter ({weights.format})"


def _convert_heads(
    args: argparse.Namespace, folder: Path, out: Path, base: str | None, config: ModelConfig | None
) -> str:
    """Write Medusa heads and say what was written."""
    from manyheads.checkpoint import resolve
    from manyheads.speculation.medusa.checkpoint import STATISTICS, read_heads, vocab_size
    from manyheads.speculation.medusa.export import read_projection, write_full, write_heads

    if args.to not in FORMATS:
        raise ConfigError(f"{folder} holds Medusa heads; their formats are {', '.join(FORMATS)}")
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
    return f"{len(weights.blocks)} heads ({weights.format})"
