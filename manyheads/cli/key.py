"""`manyheads key` makes an API key and its line for the file that `serve --api-key-file` reads."""

from __future__ import annotations

import argparse
import secrets
import sys

from manyheads.cli.parser import Parser
from manyheads.config import ConfigError


def add_commands(parser: Parser) -> None:
    """Add `manyheads key` to the program."""
    command = parser.add_command("key", "make an API key", run, "manyheads key alice >> keys.txt")
    command.add_argument("name", help="who will use it")


def run(args: argparse.Namespace) -> int:
    """Show a new key on standard error, this once, and its line, which does not tell it, on standard output."""
    from manyheads.server.keys import NAME, hash_key

    if not NAME.fullmatch(args.name):
        raise ConfigError(f"a key's name has 1 to 64 letters, digits or any of ._@-, unlike {args.name!r}")
    key = f"mh-{secrets.token_urlsafe(32)}"
    print(f"the key of {args.name}, which is shown this once: {key}", file=sys.stderr)
    print(args.name, hash_key(key))
    return 0
