"""Do texts keep to their schemas, with trees as without? Writes results/conformance.json.

    python benchmarks/conformance.py

Two hundred JSON Schemas (schemas.py), the built-in model, greedy and at temperature 1, many at a time: every text that
ends by itself has to be JSON of its schema, and the text with trees has to be that of one token a step under the same
grammar, token for token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jsonschema_rs
from common import ROOT, machine, save, table
from schemas import schemas

from manyheads import LLM, CompletionOutput, Grammar, SamplingParams

PROMPTS = ("Tell me about a person that you know.", "Write about the weather today.", "Describe a house and its owner.")


def answers(llm: LLM, forms: list[str], temperature: float, speculative: bool, most: int) -> list[CompletionOutput]:
    messages = [[{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}] for i in range(len(forms))]
    params = [
        SamplingParams(
            temperature=temperature,
            seed=i,
            max_tokens=most,
            speculative=speculative,
            grammar=Grammar("json", form),
        )
        for i, form in enumerate(forms)
    ]
    return [result.outputs[0] for result in llm.chat(messages, params)]


def holds(schema: dict[str, Any], text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return bool(jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="schemas")
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--tree-size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/conformance.json")
    args = parser.parse_args()
    given = schemas(args.count)
    forms = [json.dumps(schema) for schema in given]
    llm = LLM(tree_size=args.tree_size)
    rows: list[dict[str, Any]] = []
    for temperature in (0.0, 1.0):
        trees, plain = (answers(llm, forms, temperature, trees, args.max_tokens) for trees in (True, False))
        whole = [(i, answer) for i, answer in enumerate(trees) if answer.finish_reason == "stop"]
        wrong = [[forms[i], answer.text] for i, answer in whole if not holds(given[i], answer.text)]
        rows.append(
            {
                "temperature": temperature,
                "schemas": len(forms),
                "refused": [answer.error for answer in trees if answer.finish_reason == "error"],
                "whole": len(whole),
                "wrong": wrong,
                "same_tokens": sum(a.token_ids == b.token_ids for a, b in zip(trees, plain, strict=True)),
                "tokens": sum(len(answer.token_ids) for answer in trees),
                "steps_with_trees": sum(answer.num_steps for answer in trees),
                "steps_without": sum(answer.num_steps for answer in plain),
            }
        )
        print(rows[-1], flush=True)
    names = ["temperature", "schemas", "whole", "same_tokens", "tokens", "steps_with_trees", "steps_without"]
    table([*names, "wrong"], [[*(row[name] for name in names), len(row["wrong"])] for row in rows])
    save(args.out, "conformance", {"machine": machine(), "tree_size": args.tree_size, "rows": rows})


if __name__ == "__main__":
    main()
