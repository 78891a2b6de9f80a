"""Where the time of a step goes on a GPU: its kernels, by rows and nodes, and by tokens of prompts beside them.

    python benchmarks/gpu_profile.py MODEL OUT.json [--shapes 1x1,8x12,64x3+512] [--quantization int8]

Of a decoding step, the kernels of its two graphs; of one with prompts (of 256 tokens each), those of the whole step,
and beside it how long its matrix products take by themselves.

NOTE: kernels that begin before their predecessors end (manyheads/kernels/dependent.py) count the time that they wait,
so that their times add up to more than the step's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import write_json

from manyheads.config import EngineConfig
from manyheads.engine.build import build_engine
from manyheads.engine.engine import Engine
from manyheads.engine.graphs import Recorder
from manyheads.engine.runner import Runner
from manyheads.engine.state import admit
from manyheads.engine.step import Chunk, StepPlan
from manyheads.engine.warmup import _dummy
from manyheads.models.linear import Linear

CONTEXT, BURST, REPLAYS = 256, 8, 4
PROMPT = 256
"""Tokens of a prompt."""


def profile(engine: Engine, rows: int, nodes: float) -> dict[str, Any]:
    """Milliseconds of a step, of its graphs, and microseconds of each kernel a step."""
    runner = engine.runner
    assert isinstance(runner, Runner)
    recorded = runner.recorded
    assert recorded is not None
    requests = [_dummy(runner, i, CONTEXT) for i in range(rows)]
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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            graphs.forward.replay()
            graphs.finish.replay()
        torch.cuda.synchronize()
    graphs_ms = begin.elapsed_time(end) / REPLAYS
    return {"step_ms": step * 1e3, "graphs_ms": graphs_ms, "kernels": kernels_of(profiler, REPLAYS)}


def kernels_of(profiler: Any, repeats: int) -> dict[str, Any]:
    """Calls and microseconds of the kernels that take longest, by name."""
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in profiler.events() or []:
        if event.device_type == torch.profiler.DeviceType.CUDA:
            entry = kernels[event.name[:80]]
            entry[0] += 1 / repeats
            entry[1] += event.device_time / repeats
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:24]
    return {name: {"calls": calls, "us": round(us, 1)} for name, (calls, us) in longest}


def profile_mixed(engine: Engine, rows: int, nodes: float, prompt_tokens: int) -> dict[str, Any]:
    """The same of a step with prompts, and milliseconds of its matrix products alone."""
    runner = engine.runner
    assert isinstance(runner, Runner)
    count = max(1, prompt_tokens // PROMPT)
    lengths = [CONTEXT] * rows + [prompt_tokens // count] * count
    requests = [_dummy(runner, i, length) for i, length in enumerate(lengths)]
    decoding, prompts = requests[:rows], requests[rows:]
    for prompt in prompts:
        prompt.cached_len = 0
    runner.put(requests)
    chunks = [Chunk(prompt, prompt_tokens // count, is_last=True) for prompt in prompts]
    plan = StepPlan(chunks=chunks, decoding=decoding, draft=engine.planner.draft(nodes))

    def burst() -> float:
        start = time.perf_counter()
        steps = []
        for _ in range(BURST):
            runner.rewind(requests)
            steps.append(runner.launch(plan))
        for step in steps:
            step.read()
        return (time.perf_counter() - start) / BURST

    step = min(burst() for _ in range(8))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        burst()
        torch.cuda.synchronize()
    num_trees = plan.draft.num_tokens(rows)
    products = products_ms(runner, num_trees + prompt_tokens, num_trees + count)
    runner.clear()
    return {"step_ms": step * 1e3, "products_ms": products, "kernels": kernels_of(profiler, BURST)}


def products_ms(runner: Runner, num_tokens: int, num_last: int) -> float:
    """Milliseconds of all layers' products over so many tokens, and the vocabulary's over so many, in a graph."""
    model = runner.model
    x = {
        width: torch.randn(num_tokens, width, device=runner.device).to(model.dtype)
        for layer in model.layers
        for width in (part.product.in_features for part in _linears(layer))
    }

    def compute() -> None:
        for layer in model.layers:
            for linear in _linears(layer):
                linear.product(x[linear.product.in_features])
        model.lm_head.product(x[model.lm_head.product.in_features][:num_last])

    return recorded_ms(runner.device, compute)


def recorded_ms(device: torch.device, function: Callable[[], None], turns: int = 20) -> float:
    """Milliseconds of a function as a graph; the median of so many turns, after some that do not count."""
    recorder = Recorder(device)
    with recorder.aside():
        function()
        graph = recorder.record(function)
    times: list[float] = []
    for _ in range(4 + turns):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[4:])


def _linears(layer: Any) -> list[Linear]:
    return [layer.qkv, layer.o, layer.gate_up, layer.down]


def profiles(engine: Engine, shapes: str) -> dict[str, Any]:
    """Of shapes such as 1x1,8x12,64x3+512: rows x nodes, and tokens of prompts."""
    found = {}
    for shape in shapes.split(","):
        decoding, _, prompts = shape.partition("+")
        rows, nodes = decoding.split("x")
        if prompts:
            found[shape] = profile_mixed(engine, int(rows), float(nodes), int(prompts))
        else:
            found[shape] = profile(engine, int(rows), float(nodes))
    return found


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
        part = "graphs" if "graphs_ms" in found else "products"
        print(f"{name:12s} step {found['step_ms']:.3f} ms, its {part} {found[f'{part}_ms']:.3f}")


if __name__ == "__main__":
    main()
