"""Where the time of a step goes on a GPU: its kernels, by rows and nodes, and by tokens of prompts beside them.

    python benchmarks/gpu_profile.py MODEL OUT.json [--shapes 1x1,8x12,64x3+512] [--quantization int8] [--heads DRAFTER]

Of a decoding step, the kernels of its two graphs; of one with prompts (of 256 tokens each), those of the whole step,
and beside it how long its matrix products take by themselves. Of a decoding step whose drafter runs passes (EAGLE-3),
also how long each pass takes and how long no kernel runs in it, and the kernels of the first one in order.

NOTE: kernels that begin before their predecessors end (manyheads/kernels/dependent.py) count the time that they wait,
so that their times add up to more than the step's. That a profiler looks on makes all a little slower; by how much,
`graphs_ms` and `traced_ms` say.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

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
OPENS, OFFERS = "_open_kernel", "_offer_kernel"
"""The kernels that a pass of a drafter begins and ends with."""


class Kernel(NamedTuple):
    """Something that a GPU did; times are microseconds of one clock."""

    name: str
    start: float
    end: float


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
        graphs.half.recorded.replay()
        graphs.finish.replay()
    end.record()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            graphs.half.recorded.replay()
            graphs.finish.replay()
        torch.cuda.synchronize()
    kernels = kernels_of(profiler)
    found = {
        "step_ms": step * 1e3,
        "graphs_ms": begin.elapsed_time(end) / REPLAYS,
        "traced_ms": (max(kernel.end for kernel in kernels) - kernels[0].start) / REPLAYS / 1e3,
        "kernels": longest(kernels, REPLAYS),
    }
    passes = drafting(kernels, REPLAYS)
    return found | ({"drafting": passes} if passes else {})


def kernels_of(profiler: Any) -> list[Kernel]:
    """What the GPU did, in order."""
    events = [event for event in profiler.events() or [] if event.device_type == torch.profiler.DeviceType.CUDA]
    kernels = [Kernel(event.name[:80], event.time_range.start, event.time_range.end) for event in events]
    return sorted(kernels, key=lambda kernel: kernel.start)


def longest(kernels: Iterable[Kernel], repeats: int) -> dict[str, Any]:
    """Calls and microseconds of the kernels that take longest, by name."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for kernel in kernels:
        entry = sums[kernel.name]
        entry[0] += 1 / repeats
        entry[1] += (kernel.end - kernel.start) / repeats
    first = sorted(sums.items(), key=lambda item: -item[1][1])[:24]
    return {name: {"calls": calls, "us": round(us, 1)} for name, (calls, us) in first}


def drafting(kernels: list[Kernel], steps: int) -> dict[str, Any]:
    """How long a step's passes of its drafter take, and how long nothing runs in them.

    Each begins when the kernels before it have ended, and ends with the one that offers what it guesses. That over the
    roots, which reads what the base made of a step's tokens, is not among them.

    Args:
        kernels: of so many steps that are alike, in order.

    Returns:
        Of each pass, medians over the steps; of the last step's first pass, its kernels as name, microseconds from its
        beginning, microseconds that it takes, and microseconds before it in which nothing ran. {}: there are no passes.
    """
    found: list[list[tuple[str, float, float, float]]] = []
    begin = free_from = kernels[0].start
    is_inside = False
    for kernel in kernels:
        if OPENS in kernel.name:
            found.append([])
            begin, is_inside = free_from, True
        gap = max(0.0, kernel.start - free_from)
        free_from = max(free_from, kernel.end)
        if is_inside:
            found[-1].append((kernel.name, kernel.start - begin, kernel.end - kernel.start, gap))
        is_inside = is_inside and OFFERS not in kernel.name
    if not found:
        return {}
    count, parts = len(found) // steps, []
    for number in range(count):
        same = found[number::count]
        spans = [max(start + took for _, start, took, _ in one) for one in same]
        gaps = [sum(gap for *_, gap in one) for one in same]
        us, idle = statistics.median(spans), statistics.median(gaps)
        parts.append({"kernels": len(same[-1]), "us": round(us, 1), "gaps_us": round(idle, 2)})
    total, idle = (sum(part[name] for part in parts) for name in ("us", "gaps_us"))
    timeline = [(name, round(start, 2), round(took, 2), round(gap, 2)) for name, start, took, gap in found[-count]]
    return {"passes": parts, "us": round(total, 1), "gap_share": round(idle / total, 4), "first_pass": timeline}


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
    return {"step_ms": step * 1e3, "products_ms": products, "kernels": longest(kernels_of(profiler), BURST)}


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
    parser.add_argument("--heads", help="Medusa heads or an EAGLE-3 drafter (default: MODEL's own)")
    args = parser.parse_args()
    engine = build_engine(
        EngineConfig(
            model=str(args.model), max_model_len=2048, tree_size=4, quantization=args.quantization, heads=args.heads
        )
    )
    result = profiles(engine, args.shapes)
    write_json(args.out, result)
    for name, found in result.items():
        part = "graphs" if "graphs_ms" in found else "products"
        print(f"{name:12s} step {found['step_ms']:.3f} ms, its {part} {found[f'{part}_ms']:.3f}")
        if passes := found.get("drafting"):
            took = ", ".join(f"{one['us']:.0f}" for one in passes["passes"])
            print(f"{'':12s} passes of the drafter {took} us; {passes['gap_share']:.1%} of that nothing runs")


if __name__ == "__main__":
    main()
