from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.batch import MAX_NODES
from manyheads.speculation.costs import LEAST_SHARE, PLAIN, REACHES, CostTable, RunningCosts
from manyheads.speculation.draft import NO_DRAFT, SIZES, Draft
from manyheads.speculation.drafter import DEFAULT_ACCEPTANCE
from manyheads.speculation.gains import WINDOW
from manyheads.speculation.planner import MAX_INFLIGHT, MIN_GAIN, REGROW_EVERY, Planner, most_inflight
from manyheads.speculation.tree import Tree


def table(fixed: float, per_token: float, rows: int = 1) -> CostTable:
    """Steps that cost `fixed` plus `per_token` for each in-flight token."""
    return CostTable(
        plain={r: fixed + per_token * r for r in (1, 2 * rows)},
        trees={r: {n: fixed + per_token * n for n in (r, 64 * r)} for r in (1, 2 * rows)},
    )


def planner(fixed: float, per_token: float, rows: int = 1) -> Planner:
    """One that knows such costs."""
    made = Planner(DEFAULT_ACCEPTANCE)
    made.measured(table(fixed, per_token, rows))
    return made


def test_nothing_is_speculated_when_tokens_are_dear() -> None:
    assert planner(0.0, 1.0).choose(1) is NO_DRAFT
    assert planner(0.1, 1.0).choose(1) is NO_DRAFT


def test_the_largest_tree_is_taken_when_tokens_are_free() -> None:
    assert planner(1.0, 0.0).choose(1) == Draft(planner(1.0, 0.0).draft(64).tree, MAX_NODES)


def test_trees_shrink_as_the_load_grows() -> None:
    sizes = [planner(1.0, 0.01, rows).choose(rows).nodes for rows in (1, 4, 16, 256)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3] == 1


def test_longer_texts_are_worth_more_nodes() -> None:
    """What reading a row's cache takes is spread over what the row gains."""

    def nodes(context: int, prompt_tokens: int) -> float:
        made, costs = Planner(DEFAULT_ACCEPTANCE), table(0.2, 0.01, 16)
        costs.prompts, costs.context, costs.cached = {1: 1.01, 1000: 11.0}, 100, 1e-4
        made.measured(costs)
        made.rows_are([0] * 16, 16 * context)
        return made.choose(16, prompt_tokens).nodes

    for prompt_tokens in (0, 500):
        by_context = [nodes(context, prompt_tokens) for context in (0, 100, 1000, 4000)]
        assert by_context == sorted(by_context)
        assert by_context[0] < by_context[2] < by_context[3]


def test_rows_whose_caches_are_shorter_still_take_time() -> None:
    costs = RunningCosts(CostTable(plain={1: 1.0, 8: 1.0}, context=1000, cached=1.0))
    costs.context = 0
    assert costs.seconds(8, PLAIN) == pytest.approx(LEAST_SHARE)


def test_heads_that_cost_more_than_they_bring_are_left_alone() -> None:
    made, costs = planner(1.0, 0.0), table(1.0, 0.0)
    costs.trees = {1: {1: 10.0, 64: 10.0}}
    made.measured(costs)
    assert made.choose(1) is NO_DRAFT


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0.001, 1.0), min_size=7, max_size=7).map(sorted),
    st.floats(0.001, 1.0),
    st.integers(1, 9),
    st.integers(0, 50),
)
def test_the_choice_has_the_best_rate(seconds: list[float], plain: float, rows: int, prompt: int) -> None:
    """What a row gains, less what it would gain in as long a time without prompts, is most; without prompts, that is
    the best rate."""
    made = Planner(DEFAULT_ACCEPTANCE)
    points = {8 * n: s for n, s in zip((1, 2, 4, 8, 16, 32, 64), seconds, strict=True)}
    costs = CostTable(plain={8: plain}, trees={8: points}, prompts={1: 0.1, 32: 0.1, 64: 0.3})
    made.measured(costs)
    kinds = {1: (MIN_GAIN, costs.plain_cost(rows), rows)}  # nodes: tokens gained, seconds without prompts, tokens
    for size in SIZES[1:]:
        tokens = int(rows * size)
        if rows < tokens <= MAX_INFLIGHT:
            kinds[size] = (made.expected_tokens(made.draft(size), rows), costs.tree_cost(rows, tokens), tokens)
    rate = max(gained / seconds for gained, seconds, _ in kinds.values())
    worth = {
        size: gained - rate * (seconds + (costs.prompt_cost(tokens, prompt) if prompt else 0.0))
        for size, (gained, seconds, tokens) in kinds.items()
    }
    assert worth[made.choose(rows, prompt).nodes] == pytest.approx(max(worth.values()))


def test_a_node_is_dearer_beside_many_prompt_tokens() -> None:
    """With few tokens the weights take the time, with many the arithmetic does."""
    made = planner(1.0, 0.0)
    assert made.costs is not None
    made.costs.guess.prompts = {1: 1.0, 256: 1.0, 512: 6.0, 1024: 16.0}
    nodes = [made.choose(1, prompt).nodes for prompt in (0, 100, 240, 1000)]
    assert nodes[:2] == [MAX_NODES, MAX_NODES]
    assert nodes == sorted(nodes, reverse=True)
    assert nodes[3] < MAX_NODES / 4


def test_a_set_size_holds_at_any_load() -> None:
    made = Planner(DEFAULT_ACCEPTANCE, tree_size=6)
    assert [made.choose(rows).nodes for rows in (1, 100)] == [6, 6]
    assert made.choose(1).tree.choices == made.draft(64).tree.choices[:32]  # four times as many to choose from
    assert Planner(DEFAULT_ACCEPTANCE, tree_size=1).choose(1) is NO_DRAFT


@pytest.mark.parametrize(
    ("nodes", "reach"), [(1.25, 8), (2, 8), (2.5, 16), (4, 16), (5, 32), (8, 32), (9, 64), (16, 64), (64, 64)]
)
def test_rows_may_bring_four_times_the_average(nodes: float, reach: int) -> None:
    made = Planner(DEFAULT_ACCEPTANCE)
    draft = made.draft(nodes)
    assert (draft.nodes, draft.tree.num_nodes) == (nodes, reach)
    assert draft.propose
    assert draft.most_gained == draft.tree.max_depth + 1
    assert draft.tree.choices == made.draft(64).tree.choices[:reach]


def test_no_more_nodes_than_the_heads_have() -> None:
    draft = Planner([[0.5, 0.3]]).draft(6)
    assert draft.nodes == draft.tree.num_nodes == 3
    assert draft.num_tokens(5) == 15
    assert Planner(DEFAULT_ACCEPTANCE).draft(1) is NO_DRAFT


def test_tokens_of_a_step() -> None:
    tree = Tree(((), (0,), (0, 0)))
    assert [Draft(tree, 1.25).num_tokens(rows) for rows in (1, 3, 4, 8)] == [1, 3, 5, 10]
    assert [Draft(tree, 1.5).num_tokens(rows) for rows in (1, 2, 3)] == [1, 3, 4]
    assert Draft(tree, 9).num_tokens(2) == 6
    assert (NO_DRAFT.num_tokens(7), NO_DRAFT.propose, NO_DRAFT.most_gained) == (7, False, 1)


def test_every_smaller_draft_needs_fewer_pages_down_to_none() -> None:
    made = Planner(DEFAULT_ACCEPTANCE)
    draft, seen = made.draft(64), []
    while draft.propose:
        seen.append((draft.tree.num_nodes, draft.nodes))
        draft = made.smaller(draft)
    assert [reach for reach, _ in seen] == list(REACHES)[::-1]
    assert all(nodes == reach / 4 for reach, nodes in seen[1:])
    assert draft is NO_DRAFT
    assert made.smaller(NO_DRAFT) is NO_DRAFT
    few = Planner([[0.5, 0.3]])
    assert few.smaller(few.draft(2)) is NO_DRAFT


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(0, 50), st.floats(0.0, 0.01))
def test_no_step_has_more_tokens_than_are_measured(rows: int, prompt: int, per_token: float) -> None:
    made = planner(1.0, per_token, rows)
    draft = made.choose(rows, prompt)
    assert draft is NO_DRAFT or rows < draft.num_tokens(rows) <= most_inflight(rows)
    tokens = [draft.num_tokens(rows) for draft in made.drafts(rows)]
    assert tokens == sorted(set(tokens))
    assert not tokens or rows < tokens[0] <= tokens[-1] <= most_inflight(rows)


def test_padding_rows_are_paid_for() -> None:
    """Steps of 3 rows are steps of 4 here, and 4 rows are dear."""
    made = planner(1.0, 0.0, 3)
    assert made.choose(3).propose
    made, costs = planner(1.0, 0.0, 3), table(1.0, 0.0, 3)
    costs.trees[4] = {8: 9.0}
    made.measured(costs, lambda rows: rows + 1)
    assert made.choose(3) is NO_DRAFT


@pytest.mark.parametrize("rows", [4, 8, 100])
def test_a_part_of_the_rows_may_bring_a_node_more(rows: int) -> None:
    """Where tokens are dear, the few that are nearly sure still pay."""
    made = Planner([[0.5] + [0.01] * 9] * 3)
    points = {rows: 1.0, int(1.25 * rows): 1.01, int(1.5 * rows): 2.0, 64 * rows: 200.0}
    made.measured(CostTable(plain={rows: 1.0}, trees={rows: points}))
    made.observe_gains(made.draft(2), [0.0, 0.24, 0.3] + [0.5] * (len(SIZES) - 3), [1] * 10)
    assert made.choose(rows).nodes == 1.25


def test_without_heads_or_costs_nothing_is_speculated() -> None:
    assert Planner([], tree_size=6).choose(1) is NO_DRAFT
    assert Planner(DEFAULT_ACCEPTANCE).choose(1) is NO_DRAFT


def expected(made: Planner, nodes: float, rows: int = 1) -> float:
    """Tokens that each of so many rows gains where they bring so many nodes on average."""
    return made.expected_tokens(made.draft(nodes), rows)


def test_expected_tokens_add_up_the_nodes() -> None:
    made = Planner([[0.5, 0.25], [0.5]])
    # the nodes, most probable first: the root 1, (0) 0.5, then (1) and (0, 0) 0.25, (1, 0) 0.125
    assert [expected(made, n) for n in range(1, 6)] == pytest.approx([1.0, 1.5, 1.75, 2.0, 2.125])
    assert [expected(made, n) for n in (1.25, 1.5, 2.5)] == pytest.approx([1.125, 1.25, 1.625])


GAINS = [0.1 * i for i in range(len(SIZES))]


def test_what_the_heads_expect_replaces_the_averages() -> None:
    made = Planner(DEFAULT_ACCEPTANCE)
    made.observe_gains(made.draft(4), GAINS, [1, 0])  # 0.5 gained
    at = SIZES.index(4)
    calibration = (1 + WINDOW * (0.5 - 1)) / (1 + WINDOW * (GAINS[at] - 1))
    assert [expected(made, n) for n in SIZES] == pytest.approx([1 + g * calibration for g in GAINS])
    assert expected(made, 3.9) == expected(made, 3)
    before = expected(made, 2)
    made.observe_gains(made.draft(4), [2 * g for g in GAINS], [0, 1])
    assert before < expected(made, 2) < 1.1 * before  # one step changes little


@pytest.mark.parametrize("gained", [[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [3, 2, 0, 1]], ids=str)
@pytest.mark.parametrize("nodes", [1.25, 4, 5, 64])
def test_heads_that_promise_too_much_or_too_little_are_corrected(nodes: float, gained: list[int]) -> None:
    made = Planner(DEFAULT_ACCEPTANCE)
    for _ in range(int(8 / WINDOW)):
        made.observe_gains(made.draft(nodes), GAINS, gained)
    share = sum(gained) / len(gained) / GAINS[max(i for i, size in enumerate(SIZES) if size <= nodes)]
    assert [expected(made, n) for n in SIZES] == pytest.approx([1 + g * share for g in GAINS], rel=0.01)


def test_the_choice_follows_what_came_of_the_drafts() -> None:
    made = planner(1.0, 0.02)
    before = made.choose(1)
    assert before.propose
    for _ in range(int(8 / WINDOW)):
        made.observe_gains(before, GAINS, [0])
    for _ in range(REGROW_EVERY):
        after = made.choose(1)
    assert after is NO_DRAFT
    for _ in range(int(8 / WINDOW)):
        made.observe_gains(before, GAINS, [3])
    for _ in range(REGROW_EVERY):
        after = made.choose(1)
    assert after.propose


def test_what_comes_of_drafts_is_measured_for_each_adapter() -> None:
    """Rows of the base and of an adapter share their steps; what the one gains says nothing of the other."""
    made = planner(1.0, 0.02)
    draft = made.choose(1)
    for _ in range(int(8 / WINDOW)):
        made.observe_gains(draft, GAINS, [3, 0, 3], [0, 2, 0])

    def choice(adapters: list[int]) -> tuple[bool, float]:
        """Whether trees are brought, and what the draft above promises."""
        made.rows_are(adapters, 0)
        return made.choose(1).propose, pytest.approx(expected(made, draft.nodes), rel=0.01)

    assert choice([0]) == (True, 4.0)
    assert choice([2, 2]) == (False, 1.0)
    assert choice([0, 2, 0]) == (True, 3.0)
    assert choice([0]) == (True, 4.0)
    assert choice([1])[0]  # of another one nothing is known: what the drafter expects holds
    made.rows_are([2], 0)
    for _ in range(5000):
        made.observe_plain()
    assert expected(made, draft.nodes) > 1.5, "it is tried again"


def test_heads_that_were_given_up_are_tried_again() -> None:
    """Text that they do badly on may be followed by other text; while it is not, trying costs few steps."""
    made = planner(1.0, 0.02)

    def run(steps: int, gained: int) -> int:
        """How many of them speculate."""
        count = 0
        for _ in range(steps):
            draft = made.choose(1)
            if draft.propose:
                made.observe_gains(draft, GAINS, [gained])
                count += 1
            else:
                made.observe_plain()
        return count

    assert run(1000, 3) == 1000
    run(1000, 0)
    assert 32 <= run(10_000, 0) < 1000
    run(2000, 3)
    assert run(1000, 3) == 1000


def test_the_tree_follows_what_is_observed() -> None:
    made = planner(1.0, 0.02)
    before = made.choose(1)
    for _ in range(50):
        made.observe([[99] + [0] * 9] * 4, [100] * 4)
    for _ in range(REGROW_EVERY):
        after = made.choose(1)
    assert after.tree.choices[:5] == ((), (0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)) != before.tree.choices[:5]
    for _ in range(1000):
        made.observe([[0] * 10] * 4, [100] * 4)
    for _ in range(REGROW_EVERY):
        after = made.choose(1)
    assert after is NO_DRAFT


def run(made: Planner, costs: CostTable, rows: int, steps: int, extra: Callable[[Draft], float]) -> list[int]:
    """Nodes that a row may bring in each of so many steps, which take so much longer than at warm-up."""
    reaches = []
    for _ in range(steps):
        draft = made.choose(rows)
        cost = costs.tree_cost(rows, draft.num_tokens(rows)) if draft.propose else costs.plain_cost(rows)
        made.observe_cost(rows, draft, cost + extra(draft))
        reaches.append(draft.tree.num_nodes)
    return reaches


def test_dearer_steps_than_at_warm_up_pay_for_larger_trees() -> None:
    made = planner(1.0, 0.1)
    before = made.choose(1)
    run(made, table(1.0, 0.1), 1, 2000, lambda _: 1.6)
    assert made.choose(1).nodes > before.nodes
    run(made, table(1.0, 0.1), 1, 4000, lambda _: 0.0)
    assert made.choose(1) == before


def test_another_number_of_rows_starts_with_what_the_nearest_has_learnt() -> None:
    """Where rows may bring more than 16 nodes, a step takes as long again for each of 16 rows."""
    made = planner(1.0, 0.0, 16)
    assert made.choose(16).tree.num_nodes > 16
    run(made, table(1.0, 0.0, 16), 16, 2000, lambda draft: 1.0 if draft.tree.num_nodes > 16 else 0.0)
    learnt = made.choose(16)
    assert learnt.tree.num_nodes <= 16
    for rows in (15, 17, 12):
        assert made.choose(rows).tree == learnt.tree


def test_first_steps_say_the_most() -> None:
    made = planner(1.0, 0.0)
    seen = run(made, table(1.0, 0.0), 1, 4, lambda draft: 0.6 if draft.tree.num_nodes == 64 else 0.0)
    assert seen == [64] * 4
    assert made.choose(1, prompt_tokens=1).tree.num_nodes < 64


def test_wider_trees_than_any_observed_are_no_cheaper() -> None:
    made, costs = planner(1.0, 0.1), table(1.0, 0.1)
    rates = {}
    for draft in made.drafts(1):
        seconds = costs.tree_cost(1, draft.num_tokens(1)) + 0.5
        rates[made.expected_tokens(draft) / seconds] = draft.tree.num_nodes
    assert max(run(made, costs, 1, 1000, lambda _: 0.5)) <= rates[max(rates)]


def test_long_contexts_make_wide_trees_dearer_than_narrow_ones() -> None:
    """Every step takes 10 seconds more than it did at warm-up, and one of wide trees 20."""
    made = planner(1.0, 0.0)
    assert made.choose(1).tree.num_nodes > 16
    for _ in range(2000):
        draft = made.choose(1)
        made.observe_cost(1, draft, 21.0 if draft.tree.num_nodes > 16 else 11.0)
    chosen = [made.choose(1).tree.num_nodes for _ in range(REGROW_EVERY)]
    assert max(chosen) <= 16
    assert min(chosen) > 1


def test_one_slow_step_changes_little() -> None:
    made = planner(1.0, 0.1)
    before = made.choose(1)
    made.observe_cost(1, before, 1e6)
    assert made.choose(1).nodes <= before.nodes + 4


def test_before_any_step_many_rows_expect_what_the_surest_of_them_gain() -> None:
    made = planner(1.0, 0.1)
    assert expected(made, 4, 15) == expected(made, 4)
    assert expected(made, 4, 16) - 1 == pytest.approx(1.1 * (expected(made, 4) - 1))


def test_a_step_that_changes_what_rows_bring_says_nothing() -> None:
    """It waits for the change; the ones after it do not."""
    made, costs = planner(1.0, 0.0), table(1.0, 0.0)
    wide = made.choose(1)
    made.observe_cost(1, NO_DRAFT, costs.plain_cost(1))
    for extra in (9.0, 0.0, 0.0):
        made.observe_cost(1, wide, costs.tree_cost(1, wide.num_tokens(1)) + extra)
    assert made.costs is not None
    assert made.costs.seconds(1, wide.kind) == pytest.approx(costs.tree_cost(1, wide.num_tokens(1)))
