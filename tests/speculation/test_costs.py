"""What is measured: costs of steps, how often guesses hold, and what longer contexts add."""

from __future__ import annotations

import pytest

from manyheads.speculation.costs import PRIOR_TRIALS, WINDOW_TRIALS, Acceptance, ContextCosts, CostTable


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
    assert costs.plain_cost(2, extra_tokens=4) == pytest.approx(2 + (6 - 2))
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


def test_what_a_context_adds_is_learnt_and_no_wider_tree_is_cheaper() -> None:
    context = ContextCosts()
    assert context.offset(3, 16) == 0.0
    for _ in range(200):
        context.observe(4, 16, predicted=1.0, seconds=1.5)
    assert context.offset(4, 16) == pytest.approx(0.5, rel=1e-3)
    assert context.offset(4, 64) == context.offset(4, 16)  # no less, though nobody saw it
    assert 0 < context.offset(4, 8) < context.offset(4, 16)  # drifts there
    assert context.offset(2, 16) == pytest.approx(context.offset(4, 16) / 2)  # by the row
    for _ in range(200):
        context.observe(4, 16, predicted=1.0, seconds=0.1)
    assert 0 <= context.offset(4, 16) < 1e-3  # never below what was measured
