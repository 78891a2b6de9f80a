"""Starts a server with the fake engine: `python -m tests.server.launch FOLDER [OPTIONS]`, options of `serve`."""

from __future__ import annotations

import argparse
import sys

from manyheads.cli import make_parser
from manyheads.cli.serve import run
from manyheads.server import run as server_run

if __name__ == "__main__":
    args: argparse.Namespace = make_parser().parse_args(["serve", *sys.argv[1:]])
    original = server_run.serve
    server_run.serve = lambda config, options: original(config, options, build="tests.server.fake_engine:build")
    sys.exit(run(args))
