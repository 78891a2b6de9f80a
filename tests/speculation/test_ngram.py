"""What followed the last tokens earlier, against a search in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.batch import RowState
from manyheads.speculation.costs import CostTable
from manyheads.speculation.drafter import Kept
from manyheads.speculation.ngram import CHANCES, DEPTH, GOES_ON, LONGEST, PLACES, NgramDrafter, NgramSource
from manyheads.speculation.planner import Planner
from manyheads.speculation.tree import Tree

CPU = torch.device("cpu")
MAX_LEN = 40


def drafter_and_state(num_rows: int) -> tuple[NgramDrafter, RowState]:
    shape = NgramSource(MAX_LEN).shape
    state = RowState(num_rows, MAX_LEN, 4, shape.num_candidates, 9, CPU, shape.row_state)
    return NgramDrafter(shape, CPU), state


def wanted(text: list[int]) -> list[tuple[int, list[int]]]:
    """The best places: how many tokens before each are the text's last ones, and what follows there."""
    places = []
    for end in range(len(text) - 1):
        same = 0
        while same < LONGEST and same <= end and text[end - same] == text[len(text) - 1 - same]:
            same += 1
        if same:
            places.append((same, end))
    best = sorted(places, reverse=True)[:PLACES]
    return [(same, (text[end + 1 :] * DEPTH)[:DEPTH]) for same, end in best]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=MAX_LEN), min_size=1, max_size=4), st.integers(0, 9))
def test_candidates_are_what_followed_the_longest_match(texts: list[list[int]], gained: int) -> None:
    """Also where the last tokens came from a step, behind padding, and to rows in another order."""
    drafter, state = drafter_and_state(len(texts))
    order = list(range(len(texts)))[::-1]
    widths = [min(gained, len(texts[row]) - 1) for row in order]
    tokens = torch.full((len(order), max([*widths, 1])), 8)
    for i, row in enumerate(order):
        text, width = texts[row], widths[i]
        drafter.admit(state, row, text[: len(text) - width])
        state.cached_len[row] = len(text) - 1  # after the step
        tokens[i, :width] = torch.tensor(text[len(text) - width :])
    kept = Kept(torch.tensor(order), torch.empty(len(order), 1), tokens, torch.tensor(widths)[:, None])
    drafter.observe(state, kept)
    found, chances = drafter.propose(state, kept, DEPTH, nodes=4)
    for i, row in enumerate(order):
        seen: list[int] = []
        best = wanted(texts[row])
        for place in range(PLACES):
            columns = slice(place * DEPTH, (place + 1) * DEPTH)
            same, follows = best[place] if place < len(best) else (0, [])
            first = 0.0 if not follows or follows[0] in seen else CHANCES[same]
            seen += follows[:1]
            assert found[i, columns].tolist() == follows + [0] * (DEPTH - len(follows))
            expected = [first, *[GOES_ON] * (len(follows) - 1)] if follows else []
            assert chances[i, columns].tolist() == pytest.approx(expected + [0.0] * (DEPTH - len(expected)))


def test_nodes_hold_the_tokens_of_their_own_branch() -> None:
    drafter, _ = drafter_and_state(1)
    tree = Tree(((), (0,), (2,), (2, 0), (0, 0), (2, 0, 0)))
    assert drafter.columns(tree) == [0, 1, 1 + 2 * DEPTH, 2 + 2 * DEPTH, 2, 3 + 2 * DEPTH]


def test_what_was_offered_follows_the_branch_that_came_out() -> None:
    drafter, _ = drafter_and_state(1)
    chains = [[place * 100 + i for i in range(DEPTH)] for place in range(PLACES)]
    candidates = [token for chain in chains for token in chain]
    assert list(drafter.follow(candidates, [100, 101, 7])) == [[0, 100, 200], [101], [102]]
    assert list(drafter.follow(candidates, [5])) == [[0, 100, 200]]
    whole = list(drafter.follow(candidates, chains[2]))
    assert whole == [[0, 100, 200], *([token] for token in chains[2][1:])]
    assert [len(ranks) for ranks in drafter.prior] == [len(offered) for offered in whole]


def test_the_planner_gives_up_where_nothing_is_gained_and_keeps_where_much_is() -> None:
    drafter, _ = drafter_and_state(1)
    for gain, draws in ((0.0, False), (1.5, True)):
        planner = Planner(drafter.prior)
        planner.measured(CostTable(plain={1: 1.0}, trees={1: {1: 1.0, 64: 1.6}}))
        for _ in range(300):
            draft = planner.choose(1)
            if draft.propose:
                planner.observe_gains(draft, [gain] * 14, [int(gain)])
        assert planner.choose(1).propose == draws
