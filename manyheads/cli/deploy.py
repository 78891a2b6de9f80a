"""`manyheads deploy` runs a model on a Ray cluster that is there, or writes the config file that does."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from manyheads.cli.extras import needs_ray
from manyheads.cli.parser import Parser, add_answers, add_engine, add_model, answer_settings, engine_config
from manyheads.config import EngineConfig


def add_commands(parser: Parser) -> None:
    """Add `manyheads deploy` to the program."""
    example = "manyheads deploy Qwen/Qwen3-8B --replicas 2 --most-replicas 8"
    command = parser.add_command("deploy", "serve a model on a Ray cluster", run, example)
    add_model(command)
    group = command.add_argument_group("cluster")
    group.add_argument(
        "--address", default="auto", help="of the cluster (default: auto, the one that this machine is in)"
    )
    group.add_argument("--name", default="manyheads", help="of the application; each model of a cluster has its own")
    group.add_argument(
        "--route-prefix", default="/", help="where the cluster's HTTP offers it, such as /qwen (default: /)"
    )
    group.add_argument("--replicas", type=int, default=1, help="engines at first (default: 1)")
    group.add_argument("--most-replicas", type=int, help="engines at most: they follow the load (default: they do not)")
    group.add_argument("--least-replicas", type=int, default=1, help="engines at least, then (default: 1)")
    group.add_argument("--open-requests", type=float, default=32.0, help="that an engine is for, then (default: 32)")
    group.add_argument("--ingresses", type=int, default=1, help="front ends that speak HTTP (default: 1)")
    group.add_argument("--cpus", type=float, default=1.0, help="processors kept for an engine (default: 1)")
    group.add_argument("--gpus", type=float, help="GPUs kept for an engine (default: one for each rank; 0 on a CPU)")
    group.add_argument("--may-grow", action="store_true", help="the cluster adds machines by itself: wait for them")
    group.add_argument(
        "--config", action="store_true", help="write the config file for `serve deploy`, and deploy nothing"
    )
    add_answers(command.add_argument_group("answers (files are read on every machine, at the same path)"))
    add_engine(command)


def run(args: argparse.Namespace) -> int:
    """Deploy, or write the config file to standard output."""
    from manyheads.scale.settings import AppSettings

    app = {"name": args.name, "route_prefix": args.route_prefix, "import_path": "manyheads.scale:app"}
    given = _settings(args)
    settings = AppSettings.read(given)
    if args.config:
        json.dump({"applications": [app | {"args": given}]}, sys.stdout, indent=2)  # which is YAML as well
        print()
        return 0
    with needs_ray():
        from manyheads.scale.deploy import deploy

    deploy(settings, args.address, args.name, args.route_prefix, args.may_grow)
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The `args` of the application, without what is as by default."""
    config, default = asdict(engine_config(args)), asdict(EngineConfig())
    engine = {name: value for name, value in config.items() if value != default[name]}
    scaling: dict[str, Any] = {"replicas": args.replicas, "least": args.least_replicas}
    if args.most_replicas is not None:
        scaling |= {"most": args.most_replicas, "open_requests": args.open_requests}
    resources: dict[str, Any] = {"num_cpus": args.cpus} | ({} if args.gpus is None else {"num_gpus": args.gpus})
    return {
        "engine": engine,
        "server": {name: value for name, value in answer_settings(args).items() if value},
        "scaling": scaling,
        "resources": resources,
        "ingresses": args.ingresses,
    }
