"""How many tokens a step gives, by tree size, for the prompts of gpu.py; writes results/tokens_per_step.json.

    python benchmarks/tokens_per_step.py

The built-in model and its enlarged forms write the same text, so any machine will do. The trees are the planner's own,
grown from what it observes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import BUILTIN, ROOT, SPEC_BENCH, machine, save, table
from gpu import spec_bench_prompts

from manyheads import LLM, SamplingParams

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens-out", type=int, default=256)
    parser.add_argument("--spec-bench", type=Path, default=SPEC_BENCH)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/tokens_per_step.json")
    args = parser.parse_args()
    prompts = spec_bench_prompts(BUILTIN, args.spec_bench, 128, args.prompts)
    params = SamplingParams(temperature=0.0, max_tokens=args.tokens_out, ignore_eos=True)
    steps: dict[str, list[int]] = {}
    for size in SIZES:
        llm = LLM(tree_size=size, max_num_seqs=16)
        # the prompt's step gives a token too
        steps[str(size)] = [output.outputs[0].num_steps - 1 for output in llm.generate(prompts, params)]
        print(size, round((args.tokens_out - 1) * len(prompts) / sum(steps[str(size)]), 3), flush=True)
    mean = {size: (args.tokens_out - 1) * len(prompts) / sum(counts) for size, counts in steps.items()}
    table(["nodes", "tokens a step"], [[size, f"{value:.2f}"] for size, value in mean.items()])
    result = {"machine": machine(), "tokens_out": args.tokens_out, "tokens_per_step": mean, "steps": steps}
    save(args.out, "greedy", result)


if __name__ == "__main__":
    main()
