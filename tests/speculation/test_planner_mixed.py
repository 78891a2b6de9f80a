"""What the planner settles on where prompts come beside nearly every step, as under load they do."""

from __future__ import annotations

import random

import pytest

from manyheads.speculation.costs import CostTable
from manyheads.speculation.draft import SIZES, Draft
from manyheads.speculation.eagle3.drafter import ACCEPTANCE
from manyheads.speculation.eagle3.template import Template
from manyheads.speculation.planner import Planner

TOKEN, FEW, PASS, CACHED = 20e-6, 256, 0.3e-3, 0.14e-6
"""Seconds of a token in a step of many, how many tokens take no longer than none, seconds of a drafter's pass and of a
cached token: of a 7B model on a large GPU (benchmarks/results/gpu_mixed_steps.json)."""
CONTEXT, PROMPTS = 500, 384
"""Cached tokens of a row, and tokens of prompts beside each step."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def seconds(rows: int, tokens: int, passes: int, cached: int) -> float:
    """What a step takes."""
    return TOKEN * max(FEW, tokens) + PASS * passes + CACHED * cached


def costs() -> CostTable:
    """What start-up measures of it, behind short texts."""
    context = 100
    trees = {
        r: {n: seconds(r, n, 0, r * context) for n in {int(r * s) for s in SIZES if r * s <= max(256, 4 * r)}}
        for r in ROWS
    }
    plain = {r: seconds(r, r, 0, r * context) for r in ROWS}
    prompts = {n: seconds(0, n, 0, 0) for n in (4, 16, 64, 128, 256, 512, 1024)}
    return CostTable(plain, trees, dict.fromkeys(ROWS, PASS), prompts, context, CACHED)


def gained(chance: random.Random, draft: Draft) -> int:
    """Tokens that a row gains beside its own, where all rows bring the same nodes."""
    count = int(draft.nodes) + (chance.random() < draft.nodes % 1)
    brought, node = set(draft.tree.choices[:count]), ()
    while True:
        ranks = ACCEPTANCE[len(node)] if len(node) < len(ACCEPTANCE) else []
        rank = chance.choices(range(len(ranks) + 1), [*ranks, 1 - sum(ranks)])[0]
        if rank == len(ranks) or (*node, rank) not in brought:
            return len(node)
        node = (*node, rank)


def hoped(draft: Draft) -> list[float]:
    """What the drafter expects of rows, by SIZES, of the nodes that it has looked at."""
    values = []
    for choice in draft.tree.choices[1:]:
        values.append(1.0)
        for depth, rank in enumerate(choice):
            values[-1] *= ACCEPTANCE[depth][rank]
    return [sum(values[: round(size) - 1]) for size in SIZES]


@pytest.mark.parametrize("rows", [48, 96, 192])
def test_a_step_brings_what_pays_beside_prompts(rows: int) -> None:
    """Per token that rows gain, what they take beside the prompts is within 6 % of the least of all drafts."""
    chance = random.Random(rows)
    template = Template(ACCEPTANCE)
    prior = ACCEPTANCE[: template.max_depth]
    planner = Planner(prior, None, 1.04, 1, False, frozenset(template.choices), template.num_inner)
    planner.measured(costs())
    prompts_alone = seconds(0, PROMPTS, 0, 0)

    def took(draft: Draft) -> float:
        tokens = draft.num_tokens(rows) + PROMPTS
        return seconds(rows, tokens, draft.passes, rows * CONTEXT)

    def price(draft: Draft) -> float:
        mean = sum(gained(chance, draft) for _ in range(20_000)) / 20_000
        return (took(draft) - prompts_alone) / (1 + mean)

    chosen: list[Draft] = []
    for _ in range(400):
        planner.rows_are([0] * rows, rows * CONTEXT)
        draft = planner.choose(rows, PROMPTS)
        chosen.append(draft)
        planner.observe_cost(rows, draft, took(draft) * chance.uniform(0.97, 1.03), PROMPTS)
        if draft.propose:
            planner.observe_gains(draft, hoped(draft), [gained(chance, draft) for _ in range(rows)])
        else:
            planner.observe_plain()
    least = min(price(draft) for draft in planner.drafts(rows))
    prices = {draft.kind: price(draft) for draft in set(chosen[200:])}
    mean = sum(prices[draft.kind] for draft in chosen[200:]) / 200
    assert mean < 1.06 * least, (mean / least, {kind: p / least for kind, p in prices.items()})
