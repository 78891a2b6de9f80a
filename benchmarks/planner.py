"""How much of the host's time the planner takes at each step; writes results/planner.json.

    python benchmarks/planner.py

No model runs. For each step the planner does what the engine and its scheduler have it do: it says how many tokens of
prompts the step may compute, chooses the tree, and afterwards takes in what was guessed, what was gained and how long
it took. Steps take what the planner's table says, and by chance up to 5 % more or less; candidates are right as often
as their rates say. Rows come and go: each step has as many as are named, or up to an eighth less. The table is about
that of a 7B model on an H200 (results/gpu_mixed_steps.json).

Microseconds of processor time, which other work on the machine disturbs little: the mean, which holds the rare looks at
costs and at the tree's shape, the median, and the longest of 100 steps.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, machine, percentile, save, table

from manyheads.engine.record_sizes import CHUNKS, TREE_ROWS, fitting_pass, padded_rows
from manyheads.engine.step_target import StepTarget
from manyheads.speculation.costs import CostTable
from manyheads.speculation.draft import SIZES, Draft
from manyheads.speculation.drafter import DEFAULT_ACCEPTANCE
from manyheads.speculation.eagle3.drafter import ACCEPTANCE
from manyheads.speculation.eagle3.template import Template
from manyheads.speculation.planner import Planner

ROWS = (1, 16, 64, 256)
MOST_PROMPTS = 2048
"""Tokens of prompts in a step."""
WANTED = (32, 1024)
"""So many tokens of prompts wait, at least and at most, where there are some."""
CONTEXT = 450
"""Cached tokens of a row."""
UNCOUNTED = 500
"""Steps at the beginning that are not counted: much is new in them."""


def costs() -> CostTable:
    """Seconds of steps, of a drafter's passes, and of prompts."""
    rows = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    plain = {n: 4.5e-3 + 35e-6 * n for n in rows}
    trees = {n: {int(n * size): plain[n] + 20e-6 * n * (size - 1) for size in SIZES} for n in rows}
    prompts = {tokens: 4.4e-3 + 16.5e-6 * tokens for tokens in (4, 16, 64, 128, 256, 512, 1024)}
    return CostTable(plain, trees, dict.fromkeys(rows, 0.25e-3), prompts, context=192, cached=0.14e-6)


def padded_pass(num_prompts: int, num_trees: int, num_rows: int) -> int:
    """As `RecordedSteps.padded_pass`, of all that can be recorded."""
    key = fitting_pass(num_prompts, 1, num_trees, num_rows)
    return num_prompts + num_trees if key is None else key[0][0] + key[1][0]


def medusa() -> Planner:
    return Planner(DEFAULT_ACCEPTANCE, min_gain=1.04)


def eagle3() -> Planner:
    template = Template(ACCEPTANCE)
    prior = ACCEPTANCE[: template.max_depth]
    return Planner(prior, None, 1.04, 1, offered=frozenset(template.choices), scratch=template.num_inner)


def outcomes(prior: list[list[float]], draft: Draft, rows: int, chance: random.Random) -> tuple[Any, Any, list[int]]:
    """Which candidates were right, of how many, and the tokens that each row gained beside its own."""
    hits, trials, gained = [[0] * len(ranks) for ranks in prior], [0] * len(prior), []
    for _ in range(rows):
        depth = 0
        while depth < draft.tree.max_depth:
            trials[depth] += 1
            ranks = prior[depth]
            rank = chance.choices(range(len(ranks) + 1), [*ranks, max(0.0, 1 - sum(ranks))])[0]
            if rank == len(ranks):
                break
            hits[depth][rank] += 1
            depth += 1
        gained.append(depth)
    return hits, trials, gained


def steps(planner: Planner, most: int, with_prompts: bool, count: int) -> Iterator[tuple[float, Draft]]:
    """Seconds of the planner in each step, and what the step brings."""
    chance = random.Random(0)
    prompt_sizes = tuple(tokens for tokens, _ in CHUNKS[1:])
    planner.measured(costs(), partial(padded_rows, most=max(TREE_ROWS), sizes=TREE_ROWS), padded_pass)
    target = StepTarget(planner, MOST_PROMPTS, None, prompt_sizes)
    prior, known = planner.acceptance.table(), planner.costs
    expected = [planner.expected_tokens(planner.draft(size)) - 1 for size in SIZES]
    assert known is not None
    for _ in range(count):
        rows = chance.randint(most - most // 8, most)
        adapters = [0] * rows
        wanted = chance.randint(*WANTED) if with_prompts else 0
        start = time.thread_time()
        planner.rows_are(adapters, rows * CONTEXT)
        prompts = target.prompt_tokens(rows, wanted) if wanted else 0
        draft = planner.choose(rows, prompts)
        took = time.thread_time() - start
        seconds = known.seconds(rows, draft.kind, prompts) * chance.uniform(0.95, 1.05)
        hits, trials, gained = outcomes(prior, draft, rows, chance)
        start = time.thread_time()
        planner.observe(hits, trials)
        if draft.propose:
            planner.observe_gains(draft, expected, gained, adapters)
        else:
            planner.observe_plain()
        planner.observe_cost(rows, draft, seconds, prompts)
        yield took + time.thread_time() - start, draft


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "planner.json")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "steps": args.steps, "microseconds": []}
    for name, make in (("Medusa", medusa), ("EAGLE-3", eagle3)):
        for with_prompts in (False, True):
            for rows in ROWS:
                found = list(steps(make(), rows, with_prompts, UNCOUNTED + args.steps))[UNCOUNTED:]
                times = [1e6 * took for took, _ in found]
                result["microseconds"].append(
                    {
                        "drafter": name,
                        "prompts": with_prompts,
                        "rows": rows,
                        "mean": round(statistics.mean(times), 1),
                        "median": round(statistics.median(times), 1),
                        "of_100_the_longest": round(percentile(times, 99) or 0, 1),
                        "nodes": round(statistics.mean(draft.nodes for _, draft in found), 2),
                    }
                )
    save(args.out, "planner", result)
    keys = ("drafter", "prompts", "rows", "mean", "median", "of_100_the_longest", "nodes")
    table(keys, [[each[key] for key in keys] for each in result["microseconds"]])


if __name__ == "__main__":
    main()
