"""Greedy output against transformers, token for token; writes results/exactness.json and fails on any difference.

    python benchmarks/exactness.py

Spec-Bench prompts arrive at random times at an engine with so few pages that requests are preempted, chunks of 32
prompt tokens, and a prefix (a system message) that they share in the cache; once for each tree size. transformers
answers each prompt alone, in float32.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from common import BUILTIN, ROOT, SPEC_BENCH, Prompt, machine, save, spec_bench, table
from transformers import AutoModelForCausalLM, AutoTokenizer

from manyheads import EngineConfig, SamplingParams
from manyheads.engine.build import build_engine
from manyheads.request import EngineRequest

SYSTEM = (
    "You are a helpful assistant. You answer in short and simple English sentences, you stay with the question, "
    "and you say so when you do not know the answer."
)
TREES: dict[str, int | None] = {"1": 1, "4": 4, "16": 16, "64": 64, "planner": None}


@torch.inference_mode()
def reference(model: Path, prompts: list[Prompt], new_tokens: int) -> list[list[int]]:
    """What transformers generates for each prompt alone."""
    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    replies = []
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids])
        out = llama.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
        replies.append(out[0, ids.shape[1] :].tolist())
    return replies


def served(args: argparse.Namespace, tree_size: int | None, prompts: list[Prompt]) -> tuple[list[list[int]], Any]:
    """What the engine generates while prompts arrive, and its statistics."""
    config = EngineConfig(
        model=str(args.model),
        dtype="float32",
        tree_size=tree_size,
        max_num_seqs=16,
        max_num_batched_tokens=32,
        num_blocks=args.num_blocks,
        max_queue=len(prompts),
    )
    engine = build_engine(config)
    rng = random.Random(tree_size or 0)
    waiting = [(f"{i}", prompt) for i, prompt in enumerate(prompts)]
    rng.shuffle(waiting)
    replies: dict[str, list[int]] = {request_id: [] for request_id, _ in waiting}
    while waiting or engine.has_work():
        while waiting and (not engine.has_work() or rng.random() < 0.3):
            request_id, prompt = waiting.pop()
            params = SamplingParams(temperature=0.0, max_tokens=args.new_tokens)
            engine.add_request(EngineRequest(request_id=request_id, prompt_token_ids=prompt.token_ids, params=params))
        for delta in engine.step():
            replies[delta.request_id] += delta.new_token_ids
        engine.check_integrity()
    return [replies[f"{i}"] for i in range(len(prompts))], engine.stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/exactness.json")
    parser.add_argument("--spec-bench", type=Path, default=SPEC_BENCH)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--num-blocks", type=int, default=110, help="pages of 16 tokens")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    longest = args.num_blocks * 16 - args.new_tokens
    prompts = spec_bench(tokenizer, max_prompt_tokens=min(longest, 1400), path=args.spec_bench, system=SYSTEM)
    prompts = prompts[: args.prompts]
    result: dict[str, Any] = {
        "machine": machine(),
        "prompts": len(prompts),
        "categories": sorted({p.category for p in prompts}),
        "prompt_tokens": [len(p.token_ids) for p in prompts],
        "new_tokens": args.new_tokens,
        "num_blocks": args.num_blocks,
        "trees": {},
    }
    start = time.perf_counter()
    wanted = reference(args.model, prompts, args.new_tokens)
    print(f"transformers: {sum(map(len, wanted))} tokens in {time.perf_counter() - start:.0f} s", flush=True)
    rows = []
    for name, tree_size in TREES.items():
        start = time.perf_counter()
        got, stats = served(args, tree_size, prompts)
        different = [p.question_id for p, a, b in zip(prompts, got, wanted, strict=True) if a != b]
        result["trees"][name] = {
            "equal": len(prompts) - len(different),
            "different_question_ids": different,
            "preemptions": stats.preemptions,
            "prefix_hit_tokens": stats.prefix_hits,
            "tokens": stats.generation_tokens,
            "tokens_per_row_step": round(stats.generation_tokens / max(1, stats.row_steps), 3),
            "seconds": round(time.perf_counter() - start, 1),
        }
        rows.append([name, f"{len(prompts) - len(different)} of {len(prompts)}", stats.preemptions, stats.prefix_hits])
    table(["tree", "equal replies", "preemptions", "tokens from the prefix cache"], rows)
    save(args.out, "exactness", result)
    if any(tree["different_question_ids"] for tree in result["trees"].values()):
        raise SystemExit("some replies differ from transformers")


if __name__ == "__main__":
    main()
