"""What drafters give beside plain decoding, on Spec-Bench prompts by category: `--drafter ngram`, or heads.

The model answers greedily, in turns: plainly, and with each drafter with trees of fixed sizes and with a planner that
chooses. Counted are the tokens a step, the seconds of the answers, and how many are the plain ones token for token. On
a CPU seconds are processor time, which other work on the machine disturbs little: compare with one thread.

    python benchmarks/drafters.py --model FOLDER [--categories summarization rag] [--users 1]
    python benchmarks/drafters.py --heads Medusa=manyheads/builtin/model/heads EAGLE-3=FOLDER --nodes 4 16 --threads 1
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import BUILTIN, ROOT, SPEC_BENCH, machine, save, spec_bench, table

from manyheads import LLM, SamplingParams


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--heads", nargs="+", metavar="NAME=FOLDER", help="drafters (default: ngram, without weights)")
    parser.add_argument("--categories", nargs="+", default=["summarization", "rag", "qa", "writing"])
    parser.add_argument("--per-category", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--nodes", type=int, nargs="+", default=[8], help="of the trees of fixed sizes")
    parser.add_argument("--users", type=int, default=1, help="prompts that are answered at once")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--spec-bench", type=Path, default=SPEC_BENCH)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ngram.json")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    asked = spec_bench(AutoTokenizer.from_pretrained(args.model), max_prompt_tokens=1400, path=args.spec_bench)
    prompts = {c: [p.token_ids for p in asked if p.category == c][: args.per_category] for c in args.categories}
    settings: dict[str, Any] = {"num_threads": args.threads, "device": args.device, "max_model_len": 2048}
    settings |= {"max_num_seqs": args.users, "prefix_caching": False}
    drafters: dict[str, dict[str, Any]] = {"ngram": {"drafter": "ngram"}}
    if args.heads:
        drafters = {name: {"heads": folder} for name, _, folder in (given.partition("=") for given in args.heads)}
    systems = {"plain": LLM(str(args.model), speculative=False, **settings)}
    for name, drafter in drafters.items():
        for nodes in args.nodes:
            systems[f"{name}, {nodes} nodes"] = LLM(str(args.model), tree_size=nodes, **drafter, **settings)
        systems[name] = LLM(str(args.model), **drafter, **settings)
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    now = time.process_time if on_cpu else time.perf_counter
    params = SamplingParams(temperature=0.0, max_tokens=args.new_tokens)
    result: dict[str, Any] = {"machine": machine(), "users": args.users, "categories": {}}
    rows = []
    for category, ids in prompts.items():
        counts = {name: {"tokens": 0, "steps": 0, "seconds": 0.0, "equal": 0} for name in systems}
        for start in range(0, len(ids), args.users):
            batch = ids[start : start + args.users]
            texts: list[list[int]] = []
            for name, llm in systems.items():  # in turns: a machine's speed wanders
                began = now()
                found = [output.outputs[0] for output in llm.generate(batch, params)]
                count = counts[name]
                count["seconds"] += now() - began
                count["tokens"] += sum(len(output.token_ids) for output in found)
                count["steps"] += sum(output.num_steps for output in found)
                texts = texts or [output.token_ids for output in found]
                count["equal"] += sum(a == b.token_ids for a, b in zip(texts, found, strict=True))
        result["categories"][category] = {"prompts": len(ids), **counts}
        plain = counts["plain"]
        for name, count in counts.items():
            times = round(plain["seconds"] / count["seconds"], 2)
            per_step = round(count["tokens"] / count["steps"], 2)
            rows.append([category, name, per_step, times, f"{count['equal']} of {len(ids)}"])
    table(["category", "drafter", "tokens a step", "times plain", "the plain text"], rows)
    save(args.out, args.model.name, result)


if __name__ == "__main__":
    main()
