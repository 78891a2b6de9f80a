"""Step costs of a 7B model in half precision on an H200, from results that are here: `results/cluster/h200_7b.json`.

A step's seconds are users × tokens a step / tokens a second (`load_gpu/users-half-1.json`, over HTTP), those of prompts
the time until all of n prompts of 128 tokens were computed (`gpu/manyheads_medusa.json`).
"""

from __future__ import annotations

import json
from pathlib import Path

from cluster.costs import StepCosts

RESULTS = Path(__file__).resolve().parents[1] / "results"
PROMPT = 128
"""Tokens of each prompt of benchmarks/gpu.py."""
CACHE = 100_000
"""Of the 215,000 tokens that 113 GB of K/V hold at 512 KiB each, what running requests leave to texts for later."""


def costs() -> StepCosts:
    """Return the costs."""
    levels = json.loads((RESULTS / "load_gpu" / "users-half-1.json").read_text())["levels"]
    prompts = json.loads((RESULTS / "gpu" / "manyheads_medusa.json").read_text())["rows"]
    decode = [(x["load"], x["load"] * x["tokens_per_step"] / x["output_tokens_per_s"]) for x in levels]
    prefill = [(x["users"] * PROMPT, x["prefill_s"]) for x in prompts if x["users"] * PROMPT <= 2048]
    return StepCosts(
        decode=tuple((rows, round(seconds, 6)) for rows, seconds in decode),
        prefill=tuple((float(tokens), round(seconds, 6)) for tokens, seconds in prefill),
        gain=tuple((x["load"], x["tokens_per_step"]) for x in levels),
        once=round(decode[0][1], 6),  # nearly all of a single row's step is reading the weights
        spread=0.3,  # somewhat above the 0.25 of the built-in model's answers on a CPU (`validate`)
        overhead=round(levels[0]["ttft"]["p50"] - prefill[0][1], 6),
        cache_tokens=CACHE,
    )


if __name__ == "__main__":
    costs().save(RESULTS / "cluster" / "h200_7b.json", {"source": "benchmarks/cluster/from_results.py"})
