"""Tokens a step of different drafters for one base, Medusa heads and EAGLE-3, on Spec-Bench prompts by category.

The base answers greedily; then the engine answers again with each drafter and a tree of fixed size, and it is counted
how many replies are the same text. Beside that, from the base's answers alone: how often the candidates of each head or
pass are right, and what trees of 1 to 64 nodes make of it (`manyheads.train.accuracy.tokens_per_step`).

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
from manyheads.checkpoint import resolve
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.models.registry import read_config
from manyheads.train.accuracy import accuracy_table, right_ranks, tokens_per_step
from manyheads.train.base import Base
from manyheads.train.dataset import pack
from manyheads.train.kinds import read_weights, trained
from manyheads.train.prompts import Answer


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("heads", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--model", type=Path, default=BUILTIN)
    add_options(parser)
    parser.add_argument("--nodes", type=int, default=16, help="of the engine's tree")
    parser.add_argument("--device", default="cpu", help="cuda: replies can differ from plain decoding's by rounding")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "heads.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "heads.svg")
    args = parser.parse_args()
    heads = dict(given.split("=", 1) for given in args.heads)
    result = compare(args, str(args.model), heads)
    save(args.out, "spec_bench", result)
    draw(result["heads"], args.plot)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is asked, and how long the replies are."""
    parser.add_argument("--spec-bench", type=Path, default=SPEC_BENCH)
    parser.add_argument("--per-category", type=int, default=6)
    parser.add_argument("--max-prompt-tokens", type=int, default=700, help="longer prompts are left out")
    parser.add_argument("--new-tokens", type=int, default=96)


def compare(args: argparse.Namespace, model: str, heads: dict[str, str]) -> dict[str, Any]:
    """What each drafter gives, printed as a table.

    Args:
        args: what `add_options` asks for, `nodes` and `device`.
        model: a folder or a GGUF file.
        heads: the drafters' folders by name.
    """
    folder = resolve(model)
    config = read_config(folder)
    by_category: dict[str, list[Prompt]] = defaultdict(list)
    asked = spec_bench(Tokenizer.load(folder).hf, max_prompt_tokens=args.max_prompt_tokens, path=args.spec_bench)
    for prompt in asked:
        by_category[prompt.category].append(prompt)
    prompts = [p for category in sorted(by_category) for p in by_category[category][: args.per_category]]
    params = SamplingParams(temperature=0.0, max_tokens=args.new_tokens)
    ids = [prompt.token_ids for prompt in prompts]
    longest = args.max_prompt_tokens + args.new_tokens

    def replies(**settings: Any) -> list[Any]:
        llm = LLM(model, max_num_seqs=16, max_model_len=longest, device=args.device, **settings)
        return [output.outputs[0] for output in llm.generate(ids, params)]

    print(f"Spec-Bench without a drafter, {len(prompts)} prompts", flush=True)
    plain = replies(speculative=False)
    where = machine()
    if args.device == "cuda":
        where["gpu"] = torch.cuda.get_device_name()
    result: dict[str, Any] = {"machine": where, "prompts": len(prompts), "nodes": args.nodes, "heads": {}}
    base = Base.load(folder, torch.device(args.device))
    data = pack([Answer(p, list(o.token_ids)) for p, o in zip(ids, plain, strict=True)], max(1024, longest))
    for name, of in heads.items():
        print(f"Spec-Bench with {name}", flush=True)
        found = replies(heads=of, tree_size=args.nodes)
        ranks = right_ranks(base, trained(read_weights(Path(of), config), base, config), data)
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
        print(f"{name}: right at first {', '.join(f'{ranks[0]:.1%}' for ranks in part['accuracy'])}")
        print(f"{name}: {part['equal_to_plain']} of {len(prompts)} replies are plain decoding's")
    return result


def draw(heads: dict[str, Any], path: Path) -> None:
    """Tokens a step by nodes, a curve for each drafter."""
    from manyheads.bench.plots import Plot

    plot = Plot("Tokens a step by nodes of the tree", "nodes", "tokens a step")
    for name, part in heads.items():
        plot.line(
            [at["nodes"] for at in part["by_nodes"]], [at["measured"] for at in part["by_nodes"]], name, marker=""
        )
    plot.axes.set_xscale("log", base=2)
    path.write_text(plot.svg(zero=False, whole_x=(1, 2, 4, 8, 16, 32, 64)) + "\n")


if __name__ == "__main__":
    main()
