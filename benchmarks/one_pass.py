"""Chunks and trees of a step in one forward pass against two, chunks first, on a CPU; writes results/one_pass.json.

    python benchmarks/one_pass.py

The built-in model in float32 with one thread. For each case an engine has rows that decode with trees of a fixed size
when a prompt comes; in the step that holds its chunk too, the forward pass and the logits (of all nodes, and of the
prompt's last token) are computed in turns both ways. Processor time of the process, which other work on the machine
disturbs little. The median of the turns' ratios is given with its quartiles, since two neighbours had the same machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import BUILTIN, ROOT, machine, save, table

from manyheads import LLM, SamplingParams
from manyheads.engine.step_run import ChunkHidden, ChunkRows, Hidden, StepRun, TreeRows
from manyheads.request import EngineRequest

CONTEXT = 200
"""Tokens of a decoding row's prompt."""


def one_pass(forward: Any, model: Any, chunks: ChunkRows, trees: TreeRows) -> list[torch.Tensor]:
    known, hidden = forward(chunks, trees)
    return [model.logits(torch.cat((known.ends, hidden.last)))]


def two_passes(forward: Any, model: Any, chunks: ChunkRows, trees: TreeRows) -> list[torch.Tensor]:
    first = model.logits(forward(chunks, None)[0].ends)
    return [first, model.logits(forward(None, trees)[1].last)]


def turns(run: StepRun, chunks: ChunkRows, trees: TreeRows, count: int) -> dict[str, Any]:
    """Both ways by turns; they write the same to the cache, so that all turns compute the same."""
    forward = partial(StepRun.forward, run)
    ways = {"one_ms": one_pass, "two_ms": two_passes}
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, torch.Tensor] = {}
    for turn in range(count + 1):
        for name, way in list(ways.items())[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            found[name] = torch.cat(way(forward, run.model, chunks, trees))
            if turn > 0:
                times[name].append(1e3 * (time.process_time() - start))
    same = [one / two for one, two in zip(*times.values(), strict=True)]
    quartiles = statistics.quantiles(same, n=4)
    result: dict[str, Any] = {name: round(statistics.median(values), 2) for name, values in times.items()}
    result |= {"one_of_two": round(statistics.median(same), 3), "quartiles": [round(quartiles[i], 3) for i in (0, 2)]}
    result["largest_difference"] = float(f"{(found['one_ms'] - found['two_ms']).abs().max():.1e}")
    return result


def measure(rows: int, tree_size: int, sizes: list[int], count: int) -> list[dict[str, Any]]:
    """Cases of so many rows, each with a chunk of one of these sizes."""
    most = rows * tree_size + max(sizes)
    settings: dict[str, Any] = {"max_num_seqs": rows + 1, "max_num_batched_tokens": most, "num_threads": 1}
    engine = LLM(str(BUILTIN), dtype="float32", tree_size=tree_size, **settings).engine
    runner: Any = engine.runner
    run, chance = runner.run, random.Random(0)
    found: list[dict[str, Any]] = []

    def forward(
        chunks: ChunkRows | None, trees: TreeRows | None, every: bool = False
    ) -> tuple[ChunkHidden | None, Hidden]:
        if chunks is not None and trees is not None and len(chunks.tokens) in sizes:
            case = {"rows": rows, "nodes": len(trees.inflight.tokens), "chunk": len(chunks.tokens)}
            found.append(case | turns(run, chunks, trees, count))
        return StepRun.forward(run, chunks, trees, every)

    def ask(name: str, length: int, max_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        prompt = [chance.randrange(300, 4000) for _ in range(length)]
        engine.add_request(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))

    for row in range(rows):
        ask(f"row {row}", CONTEXT, 1000)
    for _ in range(rows + 4):  # until all decode
        engine.step()
    run.forward = forward
    for size in sizes:
        ask(f"chunk {size}", size, 1)
        while len(found) <= sizes.index(size):
            engine.step()
        engine.step()
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tree-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--part", default="now", help="name of this run in the results file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "one_pass.json")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "threads": 1, "turns": args.turns, "cases": []}
    for size in args.tree_sizes:
        for rows in args.rows:
            result["cases"] += measure(rows, size, args.chunks, args.turns)
            save(args.out, args.part, result)
    table(list(result["cases"][0]), [[str(value) for value in case.values()] for case in result["cases"]])


if __name__ == "__main__":
    main()
