"""What texts under schemas cost and gain on a CPU; writes results/structured.json.

    python benchmarks/structured.py

One user: tokens a second and tokens a step under a schema and of free text, of the same prompts in turns, with Medusa
and without. Many rows: the time of a step of free rows beside as many others, free ones or each with another schema,
and tokens a second of all of them. Times are the process's own, of one core, so that other work counts less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from common import ROOT, Others, machine, save, table
from schemas import Schema, record, schemas

from manyheads import LLM, Grammar, SamplingParams
from manyheads.request import EngineRequest

TEXT: Schema = {"type": "string", "minLength": 20, "maxLength": 200}
SHORT: Schema = {"type": "string", "minLength": 2, "maxLength": 40}
STEP = record({"number": {"type": "integer", "minimum": 1, "maximum": 9}, "instruction": TEXT})
FORMS = {
    "a review": record(
        {
            "title": SHORT,
            "review_text": TEXT,
            "rating_out_of_five": {"type": "integer", "minimum": 1, "maximum": 5},
            "would_recommend": {"type": "boolean"},
        }
    ),
    "a person": record(
        {
            "first_name": SHORT,
            "last_name": SHORT,
            "age_in_years": {"type": "integer", "minimum": 0, "maximum": 110},
            "favourite_colour": {"enum": ["red", "green", "blue", "none of these"]},
            "lives_in_the_city": {"type": "boolean"},
        }
    ),
    "a list of steps": record({"steps": {"type": "array", "minItems": 3, "maxItems": 5, "items": STEP}}),
    "one text": record({"answer": TEXT}),
}
PROMPTS = (
    "Tell me something about hip hop.",
    "Describe a good meal.",
    "How does one plant a tree?",
    "Who was the first king?",
)


def speed(llm: LLM, params: SamplingParams) -> dict[str, float]:
    """Of one request after another."""
    tokens = steps = 0
    seconds = 0.0
    for prompt in PROMPTS:
        generation = llm.prepare_chat([{"role": "user", "content": prompt}], params)
        began: float | None = None
        first = 0
        for _ in llm.steps([generation]):
            output = generation.outputs[0]
            if output.token_ids and began is None:  # decoding alone
                began, first = time.process_time(), len(output.token_ids)
        assert began is not None
        seconds += time.process_time() - began
        tokens += len(generation.outputs[0].token_ids) - first
        steps += generation.outputs[0].num_steps - 1
    return {"tokens": tokens, "steps": steps, "seconds": seconds}


def one_user(llm: LLM, turns: int) -> list[dict[str, Any]]:
    cases: dict[str, SamplingParams] = {}
    for trees in (True, False):
        more: dict[str, Any] = {"temperature": 0.0, "max_tokens": 150, "speculative": trees}
        cases[f"free text, {'trees' if trees else 'plain'}"] = SamplingParams(**more)
        for name, form in FORMS.items():
            grammar = Grammar("json", json.dumps(form))
            cases[f"{name}, {'trees' if trees else 'plain'}"] = SamplingParams(**more, grammar=grammar)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for turn in range(turns + 1):
        for name, params in cases.items():
            measured = speed(llm, params)
            if turn:  # the first warms up
                found[name].append(measured)
    rows = []
    for name, turns_of in found.items():
        rates = [m["tokens"] / m["seconds"] for m in turns_of]
        last = turns_of[-1]
        rows.append(
            {
                "case": name,
                "tokens": last["tokens"],
                "tokens_a_step": round(last["tokens"] / max(last["steps"], 1), 2),
                "tokens_per_s_best": round(max(rates), 1),
                "tokens_per_s_median": round(statistics.median(rates), 1),
            }
        )
    return rows


def many_rows(llm: LLM, rows: int, steps: int) -> list[dict[str, Any]]:
    """Milliseconds of a step of free rows beside as many free ones, beside as many with schemas, and by themselves."""
    forms = [
        json.dumps(schema)
        for schema in schemas(200)
        if schema.get("type") in ("object", "array") and "$defs" not in schema
    ]
    # each another one, and none that ends while it is looked at
    others = [json.dumps({"type": "array", "items": json.loads(form), "minItems": 200}) for form in forms[:rows]]
    engine = llm.engine
    found: dict[str, list[float]] = {"alone": [], "beside free rows": [], "beside rows with schemas": []}
    gains: dict[str, int] = dict.fromkeys(found, 0)
    for _ in range(2):
        for name, times in found.items():
            names = [f"free {i}" for i in range(rows)]
            ends: dict[str, Any] = {"ignore_eos": True, "max_tokens": 1000, "temperature": 1.0, "speculative": False}
            params = [SamplingParams(**ends, seed=i) for i in range(rows)]
            if name != "alone":
                names += [f"other {i}" for i in range(rows)]
                grammars = [Grammar("json", form) if "schemas" in name else None for form in others]
                params += [SamplingParams(**ends, seed=i, grammar=grammar) for i, grammar in enumerate(grammars)]
            for request_id, each in zip(names, params, strict=True):
                engine.add_request(EngineRequest(request_id=request_id, prompt_token_ids=[300, 301, 302], params=each))
            for step in range(steps + 30):
                start = time.process_time()
                deltas = engine.step()
                if step >= 30:
                    times.append((time.process_time() - start) * 1e3)
                    gains[name] += sum(len(delta.new_token_ids) for delta in deltas)
            for request_id in names:
                engine.abort(request_id)
            while engine.has_work():
                engine.step()
            print(name, statistics.median(times), flush=True)
    return [
        {
            "case": name,
            "rows": rows if name == "alone" else 2 * rows,
            "step_ms_median": round(statistics.median(times), 2),
            "step_ms_best": round(min(times), 2),
            "tokens_a_step": round(gains[name] / len(times), 1),
            "tokens_per_s": round(1e3 * gains[name] / sum(times), 1),
        }
        for name, times in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tree-size", type=int, default=8, help="nodes of one user's trees")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/structured.json")
    args = parser.parse_args()
    others = Others()
    llm = LLM(num_threads=1, tree_size=args.tree_size)
    one = one_user(llm, args.turns)
    table(list(one[0]), [list(row.values()) for row in one])
    many = many_rows(LLM(max_num_seqs=2 * args.rows, num_threads=1, speculative=False), args.rows, args.steps)
    table(list(many[0]), [list(row.values()) for row in many])
    result = {
        "machine": machine(),
        "others": round(others.share(), 2),
        "tree_size": args.tree_size,
        "one_user": one,
        "many_rows": many,
    }
    save(args.out, "structured", result)


if __name__ == "__main__":
    main()
