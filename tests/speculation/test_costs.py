"""What is measured: costs of steps, how often guesses hold, and what longer contexts add."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from manyheads.speculation.costs import PLAIN, PRIOR_TRIALS, WINDOW_TRIALS, Acceptance, CostTable, Kind, RunningCosts


def test_acceptance_starts_at_the_prior_and_learns() -> None:
    acceptance = Acceptance([[0.5, 0.1], [0.4, 0.2]])
    assert acceptance.table() == [pytest.approx([0.5, 0.1]), pytest.approx([0.4, 0.2])]
    n = int(PRIOR_TRIALS)
    acceptance.observe([[n, 0]], [n])  # a shallow step says nothing of the second head
    assert acceptance.table() == [pytest.approx([0.75, 0.05]), pytest.approx([0.4, 0.2])]
    for _ in range(200):
        acceptance.observe([[30, 60], [90, 0]], [100, 100])
    assert acceptance.table()[0] == pytest.approx([0.3, 0.6], abs=0.01)
    assert acceptance.table()[1] == pytest.approx([0.9, 0.0], abs=0.01)


def test_acceptance_forgets() -> None:
    acceptance = Acceptance([[0.5]])
    for _ in range(1000):
        acceptance.observe([[100]], [100])
    assert acceptance.table()[0][0] > 0.99
    for _ in range(int(WINDOW_TRIALS) // 100):  # one window's worth: about 1/e of the old is left
        acceptance.observe([[0]], [100])
    assert acceptance.table()[0][0] == pytest.approx(0.37, abs=0.02)


def test_costs_between_and_past_the_measured_ones() -> None:
    costs = CostTable(plain={1: 1.0, 4: 4.0}, trees={2: {2: 2.0, 10: 10.0}, 4: {4: 40.0, 8: 80.0}})
    assert [costs.plain_cost(rows) for rows in (1, 2, 4, 6)] == pytest.approx([1, 2, 4, 6])
    assert [costs.tree_cost(2, n) for n in (1, 2, 6, 10, 20)] == pytest.approx([2, 2, 6, 10, 20])
    assert costs.tree_cost(3, 8) == pytest.approx((8 + 80) / 2)
    assert [costs.tree_cost(rows, 8) for rows in (1, 9)] == pytest.approx([8, 80])
    assert CostTable(plain={1: 3.0}).plain_cost(5) == 3.0


def test_noise_makes_no_larger_step_free() -> None:
    """A last slope below zero is a measuring error: past it the cost stays."""
    costs = CostTable(plain={1: 1.0, 2: 2.0, 4: 1.0})
    assert costs.plain_cost(400) >= 1.0


def test_passes_are_paid_for_one_by_one() -> None:
    costs = CostTable(plain={1: 1.0}, trees={1: {2: 2.0, 4: 4.0}, 4: {8: 8.0}}, passes={1: 0.1, 4: 0.4})
    assert [costs.tree_cost(1, 3, passes) for passes in (0, 1, 3)] == pytest.approx([3.0, 3.1, 3.3])
    assert costs.tree_cost(4, 8, passes=2) == pytest.approx(8 + 2 * 0.4)
    assert costs.tree_cost(2, 8, passes=2) - costs.tree_cost(2, 8) == pytest.approx(2 * 0.2)  # between 1 and 4 rows
    assert costs.tree_cost(8, 8, passes=1) - costs.tree_cost(8, 8) == pytest.approx(0.8)  # past them


def test_a_drafter_without_passes_has_no_cost_of_them() -> None:
    costs = CostTable(plain={1: 1.0}, trees={1: {2: 2.0}})
    assert costs.tree_cost(1, 2) == 2.0


def running(padded_pass: Callable[[int, int, int], int] | None = None) -> RunningCosts:
    """Steps that are guessed to take 1 and 0.1 for each token."""
    guess = CostTable(
        plain={1: 1.1, 8: 1.8},
        trees={r: {r: 1 + 0.1 * r, 64 * r: 1 + 6.4 * r} for r in (1, 8)},
        prompts={1: 1.1, 1000: 101.0},
    )
    return RunningCosts(guess, padded_pass=padded_pass)


def test_prompts_cost_what_so_many_more_tokens_do() -> None:
    """Few are nearly free beside few, as the weights are read anyway; many are not."""
    costs = CostTable(prompts={1: 1.0, 64: 1.0, 128: 2.0, 256: 4.0})
    assert costs.prompt_cost(8, 16) == 0.0
    assert costs.prompt_cost(64, 64) == pytest.approx(1.0)
    assert costs.prompt_cost(32, 96) == pytest.approx(1.0)
    assert costs.prompt_cost(100, 1000) == pytest.approx(1000 / 64)
    assert CostTable().prompt_cost(8, 16) == 0.0


def test_prompts_and_trees_beside_them_are_rounded_up_as_passes_do() -> None:
    def rounded(tokens: int, to: int) -> int:
        return to * -(-tokens // to)

    costs = running(lambda prompts, trees, rows: rounded(prompts, 32) + rounded(trees, 8 * rows))
    assert costs.seconds(1, PLAIN, prompt_tokens=3) == pytest.approx(1.1 + 3.2 + 0.7)
    assert costs.seconds(1, PLAIN, prompt_tokens=33) == pytest.approx(1.1 + 6.4 + 0.7)
    few, more = (costs.seconds(1, Kind(nodes), prompt_tokens=32) for nodes in (5, 8))
    assert few == pytest.approx(more)  # the pass is the same
    assert costs.seconds(1, Kind(5)) < costs.seconds(1, Kind(8))


def test_mixed_steps_are_learnt_by_the_prompts_that_they_bring() -> None:
    """A guess that was 40 times too dear or too cheap is healed within a few steps, for prompts of all lengths."""
    for wrong in (1 / 40, 40.0):
        costs = running()
        for _ in range(12):
            costs.observe_mixed(4, Kind(8), 100, costs.guess.tree_cost(4, 32) * wrong + 10.0 * wrong)
        for tokens in (70, 100, 120, 1000):  # the last was never seen
            right = (costs.guess.tree_cost(4, 32) + 0.1 * tokens) * wrong
            assert costs.seconds(4, Kind(8), tokens) == pytest.approx(right, rel=0.05)
        assert costs.seconds(4, Kind(8)) == pytest.approx(costs.guess.tree_cost(4, 32))  # without prompts, as it was
        for _ in range(12):
            costs.observe_mixed(4, Kind(8), 1000, 500.0)
        assert costs.seconds(4, Kind(8), 1000) == pytest.approx(500.0, rel=0.05)
        assert costs.seconds(4, Kind(8), 100) == pytest.approx((costs.guess.tree_cost(4, 32) + 10) * wrong, rel=0.1)


def test_one_slow_mixed_step_is_taken_back() -> None:
    costs = running()
    for _ in range(20):
        costs.observe_mixed(4, Kind(8), 100, costs.seconds(4, Kind(8), 100))
    there = costs.seconds(4, Kind(8), 100)
    costs.observe_mixed(4, Kind(8), 100, 1000 * there)
    assert costs.seconds(4, Kind(8), 100) < 1.2 * there


def test_what_was_measured_is_the_first_guess() -> None:
    costs = running()
    assert costs.seconds(1, PLAIN) == pytest.approx(1.1)
    assert costs.seconds(1, Kind(8)) == pytest.approx(1.8)
    assert costs.seconds(1, Kind(8), prompt_tokens=10) == pytest.approx(2.8)
    assert costs.seconds(1, PLAIN, prompt_tokens=10) == pytest.approx(2.1)


def test_a_guess_that_was_too_dear_comes_down_at_once_and_so_do_its_like() -> None:
    costs = running()
    costs.observe(1, PLAIN, 1.1 / 100)
    costs.observe(1, Kind(8), 1.8 / 40)
    assert costs.seconds(1, Kind(8)) == pytest.approx(1.8 / 40)
    assert costs.seconds(1, PLAIN) == pytest.approx(1.1 / 100)  # it was seen itself
    assert costs.seconds(1, Kind(12)) == pytest.approx(2.2 / 40)
    assert costs.seconds(8, Kind(8)) == pytest.approx(7.4 / 40)  # other rows have learnt of it


def test_a_slow_step_is_taken_back_and_slow_steps_are_believed() -> None:
    costs = running()
    costs.observe(1, Kind(8), 180.0)
    assert costs.seconds(1, Kind(8)) == pytest.approx(4 * 1.8)
    costs.observe(1, Kind(8), 1.8)
    assert costs.seconds(1, Kind(8)) == pytest.approx(1.8)
    for _ in range(20):
        costs.observe(1, Kind(8), 40 * 1.8)
    assert costs.seconds(1, Kind(8)) == pytest.approx(40 * 1.8, rel=0.05)


def test_the_pace_is_everybodys() -> None:
    costs = running()
    for _ in range(50):
        costs.observe(1, PLAIN, 1.1)
    costs.observe(1, Kind(8), 1.8)
    for _ in range(200):
        costs.observe(1, PLAIN, 3.3)
    assert costs.seconds(1, PLAIN) == pytest.approx(3.3, rel=0.01)
    assert costs.seconds(1, Kind(8)) == pytest.approx(3 * 1.8, rel=0.1)


def test_more_work_takes_no_less() -> None:
    costs = running()
    for _ in range(10):
        costs.observe(1, Kind(8), 5.0)
        costs.observe(1, Kind(24), 6.0)
    for nodes, least, most in ((12, 5.0, 6.0), (16, 5.0, 6.0), (32, 6.0, 9.0)):
        assert least <= costs.seconds(1, Kind(nodes)) <= most
    assert costs.least(1, Kind(32)) >= 6.0
    assert costs.seconds(1, PLAIN) <= 5.0


def test_what_was_seen_long_ago_may_have_become_less() -> None:
    costs = running()
    costs.observe(1, PLAIN, 1.1)
    costs.observe(1, Kind(8), 9.0)
    least = []
    for _ in range(600):
        costs.observe(1, PLAIN, 1.1)
        least.append(costs.least(1, Kind(8)))
    assert least == sorted(least, reverse=True)
    assert least[0] > 0.95 * costs.seconds(1, Kind(8))
    assert least[-1] == pytest.approx(1.1)
    assert costs.age(1, Kind(8)) == 600
    assert costs.age(1, Kind(4)) is None
