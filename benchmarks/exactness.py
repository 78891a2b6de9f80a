"""Texts with any tree against those without, token for token; writes results/exactness.json and fails on a difference.

    python benchmarks/exactness.py [--heads DRAFTER] [--device cuda] [--dtype float16]

Spec-Bench prompts, each once greedily and once sampled, arrive at random times at an engine with so few pages that
requests are preempted, chunks of 32 prompt tokens, and a prefix (a system message) that they share in the cache; once
for each tree size. Greedy texts are those that transformers gives to each prompt alone; sampled ones, seed by seed,
those of the engine without a drafter, to one request at a time.

In half precision greedy texts are compared with the engine's own as well. A step of many tokens rounds its sums
otherwise than one of a single token, so that some differ there, and none of that is a failure.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from common import BUILTIN, ROOT, SPEC_BENCH, Prompt, gpu_machine, save, spec_bench, table
from transformers import AutoModelForCausalLM, AutoTokenizer

from manyheads import EngineConfig, SamplingParams
from manyheads.engine.build import build_engine
from manyheads.engine.engine import Engine
from manyheads.request import EngineRequest

SYSTEM = (
    "You are a helpful assistant. You answer in short and simple English sentences, you stay with the question, "
    "and you say so when you do not know the answer."
)
TREES: dict[str, int | None] = {"1": 1, "4": 4, "16": 16, "64": 64, "planner": None}


@torch.inference_mode()
def reference(model: Path, prompts: list[Prompt], new_tokens: int, device: str) -> list[list[int]]:
    """What transformers generates for each prompt alone."""
    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    llama.to(device)
    replies = []
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids], device=device)
        out = llama.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
        replies.append(out[0, ids.shape[1] :].tolist())
    return replies


def jobs_of(prompts: list[Prompt], new_tokens: int) -> list[EngineRequest]:
    """Each prompt greedily, then each sampled."""
    params = [SamplingParams(temperature=0.0, max_tokens=new_tokens) for _ in prompts]
    params += [SamplingParams(temperature=1.0, seed=p.question_id, max_tokens=new_tokens) for p in prompts]
    return [
        EngineRequest(request_id=f"{i}", prompt_token_ids=prompt.token_ids, params=params[i])
        for i, prompt in enumerate(prompts * 2)
    ]


def served(args: argparse.Namespace, jobs: list[EngineRequest], **settings: Any) -> tuple[list[list[int]], Engine]:
    """What the engine generates while requests arrive, and the engine."""
    some = {"max_num_seqs": 16, "max_num_batched_tokens": 32, "num_blocks": args.num_blocks, "max_queue": len(jobs)}
    config = EngineConfig(
        model=str(args.model), heads=args.heads, device=args.device, dtype=args.dtype, **(some | settings)
    )
    engine = build_engine(config)
    rng = random.Random(config.tree_size or 0)
    waiting = list(jobs)
    rng.shuffle(waiting)
    replies: dict[str, list[int]] = {job.request_id: [] for job in jobs}
    while waiting or engine.has_work():
        while waiting and (not engine.has_work() or rng.random() < 0.3):
            engine.add_request(waiting.pop())
        for delta in engine.step():
            replies[delta.request_id] += delta.new_token_ids
        engine.check_integrity()
    return [replies[job.request_id] for job in jobs], engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--heads", help="Medusa heads or an EAGLE-3 drafter (default: the model's own)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES), help="nodes of a row")
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
    jobs, count = jobs_of(prompts, args.new_tokens), len(prompts)
    result: dict[str, Any] = {
        "machine": gpu_machine(args.device),
        "dtype": args.dtype,
        "prompts": count,
        "categories": sorted({p.category for p in prompts}),
        "prompt_tokens": [len(p.token_ids) for p in prompts],
        "new_tokens": args.new_tokens,
        "num_blocks": args.num_blocks,
        "trees": {},
    }
    start = time.perf_counter()
    wanted, _ = served(args, jobs, speculative=False, max_num_seqs=1, max_num_batched_tokens=2048)
    is_exact = args.dtype == "float32"
    if is_exact:
        wanted[:count] = reference(args.model, prompts, args.new_tokens, args.device)
    print(f"without trees: {sum(map(len, wanted))} tokens in {time.perf_counter() - start:.0f} s", flush=True)
    rows, drafter = [], ""
    for name in args.trees:
        start = time.perf_counter()
        got, engine = served(args, jobs, tree_size=TREES[name])
        drafter, stats = str(engine.ready.drafter), engine.stats()
        different = [a != b for a, b in zip(got, wanted, strict=True)]
        greedy, sampled = count - sum(different[:count]), count - sum(different[count:])
        result["trees"][name] = {
            "equal_greedy": greedy,
            "equal_sampled": sampled,
            "different_question_ids": [
                p.question_id for p, differs in zip(prompts * 2, different, strict=True) if differs
            ],
            "preemptions": stats.preemptions,
            "prefix_hit_tokens": stats.prefix_hits,
            "tokens": stats.generation_tokens,
            "tokens_per_row_step": round(stats.generation_tokens / max(1, stats.row_steps), 3),
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(f"{name} nodes: {greedy} and {sampled} of {count}", flush=True)
        rows.append([name, f"{greedy} of {count}", f"{sampled} of {count}", stats.preemptions, stats.prefix_hits])
    table(["tree", "equal greedy texts", "equal sampled texts", "preemptions", "tokens from the prefix cache"], rows)
    save(args.out, f"{drafter}, {args.device}, {args.dtype}", result)
    if is_exact and any(tree["different_question_ids"] for tree in result["trees"].values()):
        raise SystemExit("some texts are others than without trees")


if __name__ == "__main__":
    main()
