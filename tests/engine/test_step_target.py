"""How many prompt tokens a step computes, and how many rows run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyheads.engine.fair_queue import FIRST_TOKENS, divide
from manyheads.engine.step_target import PROMPT_SHARE, StepTarget
from manyheads.speculation.costs import CostTable
from manyheads.speculation.draft import NO_DRAFT
from manyheads.speculation.planner import Planner

ROW, TOKEN = 0.001, 0.0001


def target(seconds: float | None = None, most: int = 1024, sizes: tuple[int, ...] = ()) -> StepTarget:
    """Steps that take 10 ms, 1 ms a row and 0.1 ms for a prompt token."""
    planner = Planner([])
    rows = (1, 64)
    prompts = {1: 0.01, 2000: 0.01 + 1999 * TOKEN}
    guess = CostTable(plain={r: 0.01 + ROW * r for r in rows}, prompts=prompts)
    planner.measured(
        guess, padded_pass=lambda prompts, trees, rows: trees + next((s for s in sizes if s >= prompts), prompts)
    )
    return StepTarget(planner, most, seconds, sizes)


def test_prompts_take_as_long_as_the_rows_beside_them() -> None:
    for rows in (1, 8, 54):
        decoding = 0.01 + ROW * rows
        tokens = target().most_prompt_tokens(rows)
        assert tokens * TOKEN <= PROMPT_SHARE * decoding < 2 * tokens * TOKEN
    assert target().most_prompt_tokens(0) == 1024  # nobody waits for them


@pytest.mark.parametrize("first", [1.0, 4.0])
def test_prompts_of_a_small_model_come_many_at_once(first: float) -> None:
    """Its steps take 1 ms without prompts and 6 with some, and the first of each size took `first` times as long."""
    planner = Planner([])
    planner.measured(CostTable(plain={1: 0.001, 64: 0.001}, prompts={1: 0.001, 1024: 0.002}))
    steps, seen = StepTarget(planner, 1024), set[int]()
    for _ in range(2000):
        tokens = steps.most_prompt_tokens(16)
        planner.observe_cost(16, NO_DRAFT, (0.006 + tokens * 1e-6) * (1.0 if tokens in seen else first), tokens)
        seen.add(tokens)
    assert steps.most_prompt_tokens(16) == 1024


def test_a_step_is_within_its_target() -> None:
    for seconds, rows in ((0.04, 1), (0.04, 16), (0.1, 16)):
        tokens = target(seconds).most_prompt_tokens(rows)
        assert 0.01 + ROW * rows + tokens * TOKEN <= seconds < 0.01 + ROW * rows + 2 * tokens * TOKEN
    assert target(0.001).most_prompt_tokens(4) == 32  # prompts get on all the same
    assert target(9.0).most_prompt_tokens(4) == 1024
    assert target(0.001, most=5).most_prompt_tokens(4) == 5


def test_no_more_rows_run_than_a_step_has_time_for() -> None:
    assert target(0.04).most_rows(64) == 30
    assert target(9.0).most_rows(64) == 64
    assert target(0.001).most_rows(64) == 1
    assert target().most_rows(64) == 64


def test_without_costs_half_of_the_tokens_are_for_prompts() -> None:
    unknown = StepTarget(Planner([]), 1024, 0.01)
    assert (unknown.most_prompt_tokens(1), unknown.most_prompt_tokens(0), unknown.most_rows(9)) == (512, 1024, 9)


def test_fewer_tokens_are_computed_rather_than_many_in_vain() -> None:
    """Steps round up to 64 and 512: of 70 tokens, 6 come with the next step; of 500, all come now."""
    rounding = target(9.0, sizes=(16, 64, 512))
    assert [rounding.prompt_tokens(4, n) for n in (10, 16, 64, 70, 500, 512)] == [10, 16, 64, 64, 500, 512]
    assert rounding.prompt_tokens(4, 700) == 700  # beyond the largest size nothing is rounded
    assert rounding.prompt_tokens(0, 70) == 70
    assert target(9.0).prompt_tokens(4, 70) == 70


PROMPTS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 2000)), min_size=1, max_size=12)


@given(PROMPTS, st.integers(1, 1500))
def test_the_budget_is_used_and_not_exceeded(wanted: list[tuple[str, int]], amount: int) -> None:
    given_tokens = divide(wanted, amount)
    assert sum(given_tokens) == min(amount, sum(tokens for _, tokens in wanted))
    assert all(0 <= g <= tokens for g, (_, tokens) in zip(given_tokens, wanted, strict=True))
    for client in "abc":  # those that get nothing are behind those that get something: all start in turn
        own = [g > 0 for g, (name, _) in zip(given_tokens, wanted, strict=True) if name == client]
        assert own == sorted(own, reverse=True)
    assert given_tokens[0] >= min(wanted[0][1], amount // (2 * len({client for client, _ in wanted})))


def test_short_prompts_do_not_wait_for_long_ones() -> None:
    assert divide([("a", 1400), ("a", 100), ("a", 90), ("a", 900), ("a", 20)], 512) == [
        512 - 100 - FIRST_TOKENS - 90 - 20,
        100,
        90,
        FIRST_TOKENS,
        20,
    ]
    assert divide([("a", 1400), ("a", 255)], 512) == [257, 255]
    assert divide([("a", 1400), ("b", 100)], 512) == [412, 100]
    assert divide([("a", 1400), ("a", 1400)], 512) == [512 - FIRST_TOKENS, FIRST_TOKENS]


@pytest.mark.parametrize("others", [40, 300, 2000])
def test_long_prompts_get_on(others: int) -> None:
    """However many short ones come, a long one has at least half of each step."""
    left, steps = 1400, 0
    while left > 0:
        left -= divide([("a", left), *[("a", others)] * 20], 200)[0]
        steps += 1
    assert steps <= 2 * 1400 / 200
