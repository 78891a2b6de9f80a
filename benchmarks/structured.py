"""What texts under schemas cost and gain; writes results/structured.json.

    python benchmarks/structured.py                                             # a CPU, the built-in model
    python benchmarks/structured.py --model ENLARGED --device cuda --users 1 16 64 --out results/structured_gpu.json

Three parts, all with one engine and greedy:

- *replies*: so many users ask for one reply after another; tokens a second of free text and of replies under a schema,
  from when each user has had a reply until nobody is left to ask again. What prompts take is part of it (they recur, so
  the prefix cache has most of each).
- *steps*: milliseconds of a step of so many rows of free text, and of as many in a long text of a schema, one token a
  step: what masks take.
- *beside*: tokens a second of rows of free text by themselves, beside as many others, and beside as many with a schema
  each, no two alike; with trees and without.

On a CPU, times are the process's own, of one core, so that other work counts less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import BUILTIN, ROOT, Others, gpu_machine, save, table
from schemas import Schema, record, schemas

from manyheads import LLM, Grammar, SamplingParams
from manyheads.frontend.conversation import Conversation
from manyheads.request import EngineRequest

TEXT: Schema = {"type": "string", "minLength": 20, "maxLength": 200}
SHORT: Schema = {"type": "string", "minLength": 2, "maxLength": 40}
STEP = record({"number": {"type": "integer", "minimum": 1, "maximum": 9}, "instruction": TEXT})
FORMS = {
    "a person": record(
        {
            "first_name": SHORT,
            "last_name": SHORT,
            "age_in_years": {"type": "integer", "minimum": 0, "maximum": 110},
            "favourite_colour": {"enum": ["red", "green", "blue", "none of these"]},
            "lives_in_the_city": {"type": "boolean"},
        }
    ),
    "a review": record(
        {
            "title": SHORT,
            "review_text": TEXT,
            "rating_out_of_five": {"type": "integer", "minimum": 1, "maximum": 5},
            "would_recommend": {"type": "boolean"},
        }
    ),
    "a list of steps": record({"steps": {"type": "array", "minItems": 3, "maxItems": 5, "items": STEP}}),
    "one text": record({"answer": TEXT}),
}
LONG_TEXT: Schema = {"type": "string", "minLength": 10_000}
QUESTIONS = (
    "Tell me something about {}.",
    "Describe {} to a child.",
    "What do people say about {}?",
    "How did {} begin?",
)
TOPICS = (
    "hip hop", "a good meal", "planting a tree", "the first king", "the sea", "a lost dog", "how bread is made",
    "the moon", "a train journey", "an old clock", "volcanoes", "a cat and a bird", "a storm", "winter", "maps",
    "robots",
)  # fmt: skip
WARM_STEPS = 30


class Asked:
    """What an engine is asked."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.names = itertools.count()
        # neighbours differ in question and topic
        texts = [question.format(topic) for question in QUESTIONS for topic in TOPICS]
        texts = [texts[17 * i % len(texts)] for i in range(len(texts))]
        chats = (Conversation([{"role": "user", "content": text}]) for text in texts)
        self._every = [llm.tokenizer.encode_chat(chat) for chat in chats]
        self.begin()

    def begin(self) -> None:
        """Let the next case have the same prompts as the one before."""
        self.prompts = itertools.cycle(self._every)

    def add(self, params: SamplingParams) -> str:
        name = str(next(self.names))
        request = EngineRequest(request_id=name, prompt_token_ids=next(self.prompts), params=params)
        self.llm.engine.add_request(request)
        return name

    def clear(self, names: Sequence[str]) -> None:
        for name in names:
            self.llm.engine.abort(name)
        while self.llm.engine.has_work():
            self.llm.engine.step()

    def seconds(self) -> float:
        """A clock: on a device, the time that passes; else what this process took."""
        return time.perf_counter() if self.llm.engine.ready.device.startswith("cuda") else time.process_time()


def replies(asked: Asked, params: SamplingParams, users: int, rounds: int) -> dict[str, Any]:
    """Tokens a second while so many users ask again and again, and tokens a step of a row."""
    asked.begin()
    engine = asked.llm.engine
    to_ask = (rounds + 1) * users
    answered = tokens = steps = 0
    open_steps: dict[str, int] = {asked.add(params): 0 for _ in range(users)}
    began: float | None = None
    while to_ask:
        for delta in engine.step():
            if delta.error is not None:
                raise SystemExit(delta.error)
            if began is not None:
                tokens += len(delta.new_token_ids)
                steps += delta.num_steps - open_steps[delta.request_id]
            open_steps[delta.request_id] = delta.num_steps
            if delta.finish_reason is not None:
                del open_steps[delta.request_id]
                answered += 1
                if to_ask:
                    to_ask -= 1
                    open_steps[asked.add(params)] = 0
        if began is None and answered >= users:
            began = asked.seconds()
    assert began is not None
    seconds = asked.seconds() - began
    asked.clear(list(open_steps))
    return {"tokens": tokens, "tokens_a_step": round(tokens / steps, 2), "tokens_per_s": round(tokens / seconds, 1)}


def part_replies(asked: Asked, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for users, trees in itertools.product(args.users, (True, False) if args.plain else (True,)):
        free = 0.0
        for name, form in {"free text": None, **FORMS}.items():
            grammar = Grammar("json", json.dumps(form)) if form is not None else None
            params = SamplingParams(temperature=0.0, max_tokens=150, speculative=trees, grammar=grammar)
            found = replies(asked, params, users, max(args.rounds, -(-args.least_replies // users)))
            free = free or found["tokens_per_s"]
            case = {"users": users, "trees": trees, "text": name}
            rows.append({**case, **found, "of_free_text": round(found["tokens_per_s"] / free, 2)})
            print(rows[-1], flush=True)
    return rows


def steady(asked: Asked, params: Sequence[SamplingParams], steps: int) -> dict[str, Any]:
    """Steps of these rows, none of which ends while it is looked at; and what comes to those without a grammar."""
    asked.begin()
    engine = asked.llm.engine
    names = [asked.add(each) for each in params]
    free = {name for name, each in zip(names, params, strict=True) if each.grammar is None}
    times: list[float] = []
    tokens = free_tokens = 0
    for step in range(WARM_STEPS + steps):
        start = asked.seconds()
        deltas = engine.step()
        if ended := [delta for delta in deltas if delta.finish_reason is not None]:
            raise SystemExit(f"a row has ended: {ended[0]}")
        if step >= WARM_STEPS:
            times.append((asked.seconds() - start) * 1e3)
            gained = {delta.request_id: len(delta.new_token_ids) for delta in deltas}
            tokens += sum(gained.values())
            free_tokens += sum(count for name, count in gained.items() if name in free)
    asked.clear(names)
    found = {"step_ms_median": statistics.median(times), "step_ms_mean": statistics.fmean(times)}
    a_second = 1e3 / sum(times)
    rates = {"tokens_per_s": tokens * a_second, "free_row_tokens_per_s": free_tokens * a_second / max(len(free), 1)}
    return {name: round(value, 2) for name, value in (found | rates).items()}


def endless(**more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, ignore_eos=True, **more)


def part_steps(asked: Asked, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    grammar = Grammar("json", json.dumps(LONG_TEXT))
    for users in args.users:
        cases = {
            "free text": [endless(speculative=False)] * users,
            "a long text": [endless(speculative=False, grammar=grammar)] * users,
        }
        rows += in_turns(asked, cases, args)
    return rows


def part_beside(asked: Asked, args: argparse.Namespace) -> list[dict[str, Any]]:
    forms = [schema for schema in schemas(200) if schema.get("type") in ("object", "array") and "$defs" not in schema]
    rows = []
    for trees in (True, False):
        free = [endless(speculative=trees)] * args.rows
        others = []
        for form in forms[: args.rows]:  # none that ends while it is looked at
            schema = {"type": "array", "items": form, "minItems": 2000}
            others.append(endless(speculative=trees, grammar=Grammar("json", json.dumps(schema))))
        cases = {"alone": free, "beside free rows": free + free, "beside rows with schemas": free + others}
        rows += [{"trees": trees, **row} for row in in_turns(asked, cases, args)]
    return rows


def in_turns(asked: Asked, cases: dict[str, list[SamplingParams]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The fastest of some turns of each case: what disturbs a machine makes a turn slower."""
    best: dict[str, dict[str, Any]] = {}
    for _, (name, params) in itertools.product(range(args.turns), cases.items()):
        found = steady(asked, params, args.steps)
        if name not in best or found["step_ms_median"] < best[name]["step_ms_median"]:
            best[name] = {"case": name, "rows": len(params), **found}
    first = next(iter(best.values()))["step_ms_median"]
    for row in best.values():
        row["of_the_first"] = round(row["step_ms_median"] / first, 3)
        print(row, flush=True)
    return list(best.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--users", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=2, help="replies to each user that count")
    parser.add_argument("--least-replies", type=int, default=8, help="that count, of all users together")
    parser.add_argument("--plain", action="store_true", help="without trees, too")
    parser.add_argument("--tree-size", type=int, help="nodes that a row brings; left out, the planner chooses")
    parser.add_argument("--rows", type=int, default=64, help="of free text, that others stand beside")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=["replies", "steps", "beside"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/structured.json")
    args = parser.parse_args()
    others = Others()
    began = time.perf_counter()
    llm = LLM(
        str(args.model),
        device=args.device,
        num_threads=1 if args.device != "cuda" else None,
        tree_size=args.tree_size,
        max_num_seqs=max(2 * args.rows, *args.users),
        max_model_len=2048,
    )
    print(f"ready after {time.perf_counter() - began:.0f} s", flush=True)
    asked = Asked(llm)
    parts = {"replies": part_replies, "steps": part_steps, "beside": part_beside}
    found = {name: parts[name](asked, args) for name in args.parts}
    for rows in found.values():
        table(list(rows[0]), [list(row.values()) for row in rows])
    device = llm.engine.ready.device
    what = {"others": round(others.share(), 2), "device": device, "tree_size": args.tree_size}
    save(args.out, f"{args.model.name}, {device}", {"machine": gpu_machine(device), **what, **found})


if __name__ == "__main__":
    main()
