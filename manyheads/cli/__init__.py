"""The command `manyheads` has a module for each subcommand or two, whose heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from manyheads.cli import bench, chat, deploy, generate, heads, key, serve, train
from manyheads.cli.parser import Parser


def make_parser() -> Parser:
    """Return the parser of the whole command."""
    parser = Parser(prog="manyheads", description="Serves language models with Medusa heads to many people at once.")
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.set_defaults(run=lambda args: _no_command(args, parser))
    for module in (serve, chat, generate, deploy, heads, train, bench, key):
        module.add_commands(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status: 2 for what cannot be done as asked, 1 for what went wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 141
    except Exception as error:
        if getattr(args, "debug", False) or not _expected(error):
            raise
        print(f"manyheads: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _expected(error: Exception) -> bool:
    """Tell whether the message says it all (a wrong setting, a missing file, an engine that told why it stopped)."""
    # NOTE: by the names of the classes' modules, for this must not import what a command did not need
    ours = type(error).__module__.startswith("manyheads.")
    return ours or isinstance(error, OSError)


def _no_command(args: argparse.Namespace, parser: Parser) -> int:
    """Print the version if that is asked for, and otherwise how the command is used."""
    if args.version:
        from importlib.metadata import version

        print(f"manyheads {version('manyheads')}")
        return 0
    parser.print_help(sys.stderr)
    return 2
