"""Heads in both directions between manyheads and medusa-llm 0.1: the same greedy text, in the same number of steps?

1. The built-in heads, written by `manyheads convert --to reference`, run in medusa-llm and in manyheads.
2. Heads made, trained a little and saved by medusa-llm's own code (first_version/save_heads.py) run in both.

Both systems run one fixed tree, so a difference in tokens a step would be one in the heads. A step of medusa-llm gives
the token that it knew before and what was accepted below it, one of manyheads what was accepted and the token after
it, the first of which comes with the prompt's step. So manyheads is asked for one token more, and its first step is not
counted.

    python benchmarks/reference_heads.py --reference-python PATH [--prompts 24] [--new-tokens 64]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import BUILTIN, ROOT, SPEC_BENCH, Prompt, ReferenceWorker, machine, save, spec_bench, table

from manyheads import LLM, SamplingParams
from manyheads.speculation.draft import Draft
from manyheads.speculation.tree import grow


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--reference-python", required=True, help="of an environment with first_version/requirements.txt"
    )
    parser.add_argument("--spec-bench", type=Path, default=SPEC_BENCH)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=16, help="of the tree")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "reference_heads.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first_version = ROOT / "benchmarks" / "first_version"
        # the base in the spelling that transformers 4.36 reads
        subprocess.run([args.reference_python, first_version / "export_heads.py", BUILTIN, folder], check=True)
        base = folder / "base"
        ours = folder / "ours"
        command = [sys.executable, "-m", "manyheads", "convert", BUILTIN, ours, "--to", "reference", "--expand"]
        subprocess.run([*map(str, command), "--base", str(base)], check=True)
        from transformers import AutoTokenizer

        prompts = spec_bench(AutoTokenizer.from_pretrained(BUILTIN), max_prompt_tokens=300, path=args.spec_bench)
        learnt, prompts = prompts[-20:], prompts[: args.prompts]
        theirs = folder / "theirs"
        (folder / "learnt.json").write_text(json.dumps([prompt.token_ids for prompt in learnt]))
        script = [args.reference_python, "-W", "ignore", first_version / "save_heads.py", base, theirs]
        subprocess.run([*map(str, script), "--prompts", str(folder / "learnt.json")], check=True)
        result: dict[str, Any] = {"machine": machine(), "new_tokens": args.new_tokens, "nodes": args.nodes}
        for title, heads in (("written by manyheads convert", ours), ("saved by medusa-llm", theirs)):
            result[title] = compare(args, heads, base, prompts, folder)
    rows = [
        [title, part["replies"], part["equal"], part["equal_steps"], part["medusa-llm"], part["manyheads"]]
        for title, part in result.items()
        if isinstance(part, dict) and "equal" in part
    ]
    header = ["heads", "replies", "equal text", "equal steps", "medusa-llm tokens/step", "manyheads tokens/step"]
    table(header, rows)
    save(args.out, "both_ways", result)


def compare(args: argparse.Namespace, heads: Path, base: Path, prompts: list[Prompt], folder: Path) -> dict[str, Any]:
    """Greedy replies of both systems with these heads."""
    llm = LLM(str(base), heads=str(heads), tree_size=args.nodes, max_num_seqs=1, dtype="float32", tokenizer=BUILTIN)
    tree, _ = grow(llm.engine.planner.acceptance.table(), args.nodes)
    fixed = Draft(tree, tree.num_nodes)
    llm.engine.planner.choose = lambda rows, prompt_tokens=0: fixed  # type: ignore[method-assign]
    path = folder / "tree.json"
    path.write_text(json.dumps([list(choice) for choice in tree.choices[1:]]))
    worker = ReferenceWorker(args.reference_python, heads, path)
    raw: list[dict[str, Any]] = []
    try:
        for prompt in prompts:
            wanted = worker.generate(prompt.token_ids, args.new_tokens)
            params = SamplingParams(temperature=0.0, max_tokens=len(wanted["token_ids"]) + 1, ignore_eos=True)
            found = llm.generate([prompt.token_ids], params)[0].outputs[0]
            pairs = zip(found.token_ids, wanted["token_ids"], strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            counts = {"tokens": len(wanted["token_ids"]), "steps": [wanted["steps"], found.num_steps - 1]}
            raw.append({"question_id": prompt.question_id, "first_difference": first} | counts)
    finally:
        worker.close()
    same = [reply for reply in raw if reply["first_difference"] is None]
    tokens = sum(reply["tokens"] for reply in raw)
    return {
        "replies": len(raw),
        "equal": len(same),
        "equal_steps": sum(reply["steps"][0] == reply["steps"][1] for reply in raw),
        "medusa-llm": round(tokens / sum(reply["steps"][0] for reply in raw), 4),
        "manyheads": round(tokens / sum(reply["steps"][1] for reply in raw), 4),
        "steps": "[medusa-llm, manyheads]",
        "raw": raw,
    }


if __name__ == "__main__":
    main()
