"""Where the time of a decoding step goes on a GPU: kernels of the step's two graphs, by rows and nodes.

    python benchmarks/gpu_profile.py MODEL OUT.json [--shapes 1x1,1x48,8x12] [--quantization int8]

NOTE: kernels that begin before their predecessors end (manyheads/kernels/dependent.py) count the time that they wait,
so that their times add up to more than the step's.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import write_json

from manyheads.config import EngineConfig
from manyheads.engine.build import build_engine
from manyheads.engine.engine import Engine
from manyheads.engine.runner import Runner
from manyheads.engine.state import admit
from manyheads.engine.step import StepPlan
from manyheads.engine.warmup import _dummy

CONTEXT, BURST, REPLAYS = 256, 8, 4


def profile(engine: Engine, rows: int, nodes: float) -> dict[str, Any]:
    """Milliseconds of a step, of its graphs, and microseconds of each kernel a step."""
    runner = engine.runner
    assert isinstance(runner, Runner)
    recorded = runner.recorded
    assert recorded is not None
    requests = [_dummy(runner, i, CONTEXT) for i in range(rows)]
    # pages of their own, as far as they go: all on one, rows would read their caches from the GPU's
    pages = itertools.cycle(range(1, runner.cache.data.shape[2]))
    for request in requests:
        request.table.pages = [next(pages) for _ in request.table.pages]
    admit(runner.state, runner.drafter, requests)
    plan = StepPlan(chunks=[], decoding=requests, draft=engine.planner.draft(nodes))

    def burst() -> float:
        runner.state.cached_len[:rows] = CONTEXT
        start = time.perf_counter()
        for step in [runner.launch(plan) for _ in range(BURST)]:
            step.read()
        return (time.perf_counter() - start) / BURST

    step = min(burst() for _ in range(6))
    graphs = recorded._steps[recorded._key(rows, plan.draft)]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(REPLAYS):
        graphs.forward.replay()
        graphs.finish.replay()
    end.record()
    torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            graphs.forward.replay()
            graphs.finish.replay()
        torch.cuda.synchronize()
    for event in profiler.events() or []:
        if event.device_type == torch.profiler.DeviceType.CUDA:
            entry = kernels[event.name[:80]]
            entry[0] += 1 / REPLAYS
            entry[1] += event.device_time / REPLAYS
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:24]
    return {
        "step_ms": step * 1e3,
        "graphs_ms": begin.elapsed_time(end) / REPLAYS,
        "kernels": {name: {"calls": calls, "us": round(us, 1)} for name, (calls, us) in longest},
    }


def profiles(engine: Engine, shapes: str) -> dict[str, Any]:
    """Of shapes such as 1x1,8x12: rows x nodes."""
    pairs = [shape.split("x") for shape in shapes.split(",")]
    return {f"{rows}x{nodes}": profile(engine, int(rows), float(nodes)) for rows, nodes in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", default="1x1,1x48,8x12,16x6,32x4,64x4,256x1,256x2")
    parser.add_argument("--quantization")
    args = parser.parse_args()
    engine = build_engine(
        EngineConfig(model=str(args.model), max_model_len=2048, tree_size=4, quantization=args.quantization)
    )
    result = profiles(engine, args.shapes)
    write_json(args.out, result)
    for name, found in result.items():
        print(f"{name:8s} step {found['step_ms']:.3f} ms, its graphs {found['graphs_ms']:.3f}")


if __name__ == "__main__":
    main()
