"""Serves like `manyheads serve`, with steps as long as a slower machine's: `CLUSTER_PACE=base,row,token` in seconds.

A step of r decoding rows and p prompt tokens sleeps until base + r × row + p × token have passed. Everything else is
the real thing: scheduler, trees, acceptance, prefix cache, HTTP. So several replicas fit on a few cores, as each
computes for a small part of its time, and what other work does to a step matters little.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from typing import Any

from manyheads.cli import main
from manyheads.config import EngineConfig
from manyheads.engine import build as real
from manyheads.engine.engine import Engine
from manyheads.server import run


def build(config: EngineConfig, *args: Any) -> Engine:
    """Make the engine in its process."""
    base, row, token = map(float, os.environ["CLUSTER_PACE"].split(","))
    engine = real.build_engine(config, *args)
    launch = engine.runner.launch

    @functools.wraps(launch)
    def paced(plan: Any, *more: Any) -> Any:
        due = time.perf_counter() + base + row * len(plan.decoding)
        due += token * sum(chunk.num_inflight for chunk in plan.chunks)
        step = launch(plan, *more)
        time.sleep(max(0.0, due - time.perf_counter()))
        return step

    engine.runner.launch = paced  # type: ignore[method-assign, assignment]
    return engine


if __name__ == "__main__":
    if os.environ.get("CLUSTER_PACE"):
        run.serve = functools.partial(run.serve, build="cluster.paced:build")
    sys.exit(main(["serve", *sys.argv[1:]]))
