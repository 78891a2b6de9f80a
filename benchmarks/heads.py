"""Tokens a step of different heads for one base, on Spec-Bench prompts by category.

The base answers greedily; then the engine answers again with each set of heads and a tree of fixed size, and it is
counted how many replies are the same text. Beside that, from the base's answers alone: how often each head's candidates
are right, and what trees of 1 to 64 nodes make of it (`manyheads.train.accuracy.tokens_per_step`).

    python benchmarks/heads.py shipped=manyheads/builtin/model/heads trained=OUT [--model BASE]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import BUILTIN, ROOT, SPEC_BENCH, Prompt, machine, save, spec_bench, table

from manyheads import LLM, SamplingParams
from manyheads.bench.plots import Plot
from manyheads.models.registry import read_config
from manyheads.speculation.medusa.checkpoint import read_heads
from manyheads.train.accuracy import accuracy_table, right_ranks, tokens_per_step
from manyheads.train.base import Base
from manyheads.train.dataset import pack
from manyheads.train.medusa import TrainedHeads
from manyheads.train.prompts import Answer


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("heads", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--spec-bench", type=Path, default=SPEC_BENCH)
    parser.add_argument("--per-category", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--nodes", type=int, default=16, help="of the engine's tree")
    parser.add_argument("--device", default="cpu", help="cuda: replies can differ from plain decoding's by rounding")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "heads.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "heads.svg")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    by_category: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in spec_bench(AutoTokenizer.from_pretrained(args.model), max_prompt_tokens=700, path=args.spec_bench):
        by_category[prompt.category].append(prompt)
    prompts = [p for category in sorted(by_category) for p in by_category[category][: args.per_category]]
    params = SamplingParams(temperature=0.0, max_tokens=args.new_tokens)
    ids = [prompt.token_ids for prompt in prompts]

    def replies(**settings: Any) -> list[Any]:
        llm = LLM(str(args.model), max_num_seqs=16, device=args.device, **settings)
        return [output.outputs[0] for output in llm.generate(ids, params)]

    plain = replies(speculative=False)
    result: dict[str, Any] = {"machine": machine(), "prompts": len(prompts), "nodes": args.nodes, "heads": {}}
    base = Base.load(args.model, torch.device(args.device))
    for given in args.heads:
        name, folder = given.split("=", 1)
        found = replies(heads=folder, tree_size=args.nodes)
        weights = read_heads(Path(folder), read_config(args.model))
        heads = TrainedHeads.of(weights, base.projection.detach().float().cpu()).to(base.device)
        data = pack([Answer(p, list(o.token_ids)) for p, o in zip(ids, plain, strict=True)], 1024)
        ranks = right_ranks(base, heads, data)
        accuracy = accuracy_table(ranks)
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for prompt, output in zip(prompts, found, strict=True):
            for key in (prompt.category, "all"):
                counts[key][0] += len(output.token_ids)
                counts[key][1] += output.num_steps
        result["heads"][name] = {
            "equal_to_plain": sum(a.token_ids == b.token_ids for a, b in zip(plain, found, strict=True)),
            "tokens_per_step": {key: round(tokens / steps, 4) for key, (tokens, steps) in counts.items()},
            "accuracy": accuracy,
            "by_nodes": tokens_per_step(ranks, accuracy),
        }
    names = list(result["heads"])
    rows = [
        [key, *(result["heads"][n]["tokens_per_step"][key] for n in names)] for key in ("all", *sorted(by_category))
    ]
    print(f"tokens a step with {args.nodes} nodes, {len(prompts)} prompts, {args.new_tokens} tokens, greedy")
    table(["category", *names], rows)
    for name, part in result["heads"].items():
        print(f"{name}: {part['equal_to_plain']} of {len(prompts)} replies are plain decoding's")
    save(args.out, "spec_bench", result)
    draw(result["heads"], args.plot)


def draw(heads: dict[str, Any], path: Path) -> None:
    """Tokens a step by nodes, a curve for each set of heads."""
    plot = Plot("Tokens a step by nodes of the tree", "nodes", "tokens a step")
    for name, part in heads.items():
        plot.line(
            [at["nodes"] for at in part["by_nodes"]], [at["measured"] for at in part["by_nodes"]], name, marker=""
        )
    plot.axes.set_xscale("log", base=2)
    path.write_text(plot.svg(zero=False, whole_x=(1, 2, 4, 8, 16, 32, 64)) + "\n")


if __name__ == "__main__":
    main()
