"""The planner over a drafter that runs a pass for each depth: how deep is worth it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.speculation.costs import CostTable
from manyheads.speculation.draft import NO_DRAFT, SIZES
from manyheads.speculation.drafter import DEFAULT_ACCEPTANCE
from manyheads.speculation.gains import WINDOW
from manyheads.speculation.planner import MIN_GAIN, Planner

CHAINS = [[0.6, 0.1]] * 4
"""Nodes by probability: (0) 0.6, (0, 0) 0.36, (0, 0, 0) 0.216, (0, 0, 0, 0) 0.13, (1) 0.1, …"""


def planner(one_pass: float, prior: list[list[float]] = CHAINS, per_depth: int = 1) -> Planner:
    """Steps that cost 1, their tokens a little, and a pass so much."""
    made = Planner(prior, passes_per_depth=per_depth)
    points = {1: 1.0, 64: 1.1}
    made.measured(CostTable(plain={1: 1.0, 4: 1.0}, trees={1: points, 4: points}, passes={1: one_pass, 4: one_pass}))
    return made


@pytest.mark.parametrize("rows", [1, 4])
def test_the_dearer_a_pass_the_shallower_the_draft(rows: int) -> None:
    costs = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 1.0)
    depths = [planner(cost).choose(rows).tree.max_depth for cost in costs]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == 4
    assert len(set(depths)) > 3
    assert planner(1.0).choose(rows) is NO_DRAFT


def test_a_draft_says_how_many_passes_it_takes() -> None:
    made = planner(0.0, per_depth=2)
    assert [made.draft(8, depth).passes for depth in (1, 2, 3)] == [2, 4, 6]
    assert [made.draft(8, depth).tree.max_depth for depth in (1, 2, 3)] == [1, 2, 3]
    assert made.draft(8).passes == 2 * made.draft(8).tree.max_depth
    assert made.draft(1, 3) is NO_DRAFT
    free = Planner(CHAINS)
    assert free.draft(8).passes == 0
    assert len({draft.nodes for draft in free.drafts(1)}) == len(free.drafts(1))  # one of each size


def test_a_shallow_draft_has_no_more_nodes_than_there_are() -> None:
    draft = planner(0.0).draft(16, 1)
    assert draft.tree.choices == ((), (0,), (1,))
    assert draft.nodes == draft.num_tokens(1) == 3


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.02, 0.7), min_size=1, max_size=6), min_size=1, max_size=4),
    st.floats(0.0, 0.5),
    st.floats(0.0, 0.05),
    st.integers(1, 40),
)
def test_the_choice_has_the_best_rate(prior: list[list[float]], one_pass: float, per_token: float, rows: int) -> None:
    """Before any step, by the chances of the nodes that a draft would bring if all rows brought the same."""
    made = Planner(prior, passes_per_depth=1)
    points = {rows: 1.0, 64 * rows: 1.0 + 63 * rows * per_token}
    costs = CostTable(plain={rows: 1.0}, trees={rows: points}, passes={rows: one_pass})
    made.measured(costs)
    rates = {NO_DRAFT: MIN_GAIN * rows / 1.0}
    for draft in made.drafts(rows):
        seconds = 1.0 + per_token * (draft.num_tokens(rows) - rows) + one_pass * draft.tree.max_depth
        rates[draft] = rows * made.expected_tokens(draft, rows) / seconds
    chosen = made.choose(rows)
    assert rates[chosen] == pytest.approx(max(rates.values()))


def test_what_a_depth_promises_is_what_its_nodes_do() -> None:
    made = planner(0.0)
    every = [0.6, 0.36, 0.216, 0.1296, 0.1]  # most probable first
    assert made.expected_tokens(made.draft(3)) == pytest.approx(1 + sum(every[:2]))
    assert made.expected_tokens(made.draft(3, 1)) == pytest.approx(1 + 0.6 + 0.1)
    assert made.expected_tokens(made.draft(3, 2)) == pytest.approx(1 + 0.6 + 0.36)
    assert made.expected_tokens(made.draft(4, 2)) == pytest.approx(1 + 0.6 + 0.36 + 0.1)
    assert made._share(made.draft(3, 1)) == pytest.approx(0.7 / 0.96)
    assert made._share(made.draft(3)) == 1.0
    assert made._share(NO_DRAFT) == 1.0
    assert Planner(CHAINS)._share(Planner(CHAINS).draft(6, 1)) == 1.0  # all depths come at once


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0.02, 0.9), min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_share_grows_with_depth_up_to_all(prior: list[list[float]]) -> None:
    made = Planner(prior, passes_per_depth=1)
    for nodes in (1.25, 2, 3.5, 8, 24):
        drafts = [made.draft(nodes, depth) for depth in range(1, len(prior) + 1)]
        alike = [made._share(draft) for draft in drafts if draft.nodes == drafts[-1].nodes]
        assert all(0 < low <= high + 1e-9 for low, high in pairwise(alike))
        assert max(alike) <= 1 + 1e-9
        assert made._share(made.draft(nodes)) == pytest.approx(1.0)


def test_what_shallow_drafts_gained_says_more_of_deep_ones() -> None:
    """A row gained 0.7 where 0.7 was expected; nodes of any depth would have gained 0.96 / 0.7 times as much."""
    made = planner(0.0)
    shallow, gains = made.draft(3, 1), [0.7] * len(SIZES)
    for _ in range(int(8 / WINDOW)):
        made.observe_gains(shallow, gains, [1, 0, 1, 1, 0, 1, 1, 0, 1, 1])
    assert made.expected_tokens(shallow) == pytest.approx(1.7, rel=0.01)
    assert made.expected_tokens(made.draft(3)) == pytest.approx(1.96, rel=0.01)
    # that there were no more guesses is what was asked for, and says nothing of drafts that ask for more
    assert made.expected_tokens(made.draft(6)) == pytest.approx(1 + 0.6 + 0.36 + 0.216 + 0.1296 + 0.1, rel=0.01)


def test_passes_make_nothing_else_dearer() -> None:
    """What a step's passes take is known from the table; rows that bring their roots alone run none."""
    for depth, seconds in ((2, 1.0 + 2 * 0.5), (0, 1.0)):
        made = Planner(DEFAULT_ACCEPTANCE, passes_per_depth=1)
        made.measured(CostTable(plain={1: 1.0}, trees={1: {1: 1.0, 64: 1.0}}, passes={1: 0.5}))
        draft = made.draft(4, depth) if depth else NO_DRAFT
        for _ in range(50):
            made.observe_cost(1, draft, seconds)
        assert made.costs is not None
        assert made.costs.seconds(1, draft.kind) == pytest.approx(seconds)
        other = made.draft(4, 1)
        assert made.costs.seconds(1, other.kind) == pytest.approx(1.0 + 0.5)
