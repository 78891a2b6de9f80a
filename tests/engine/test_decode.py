"""From a row's draft to its tree, and from the verdict to its next state, against plain Python."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyheads.engine.decode import InFlight, advance, expand, place
from manyheads.engine.state import RowState
from manyheads.medusa.tree import Choice, Tree, chain_tensors, tree_tensors
from manyheads.medusa.verify import Verdict
from tests.kernels import DEVICE

CPU = torch.device("cpu")
HEADS, RANKS, ROWS, MAX_LEN = 4, 3, 5, 40


@dataclass(frozen=True)
class Case:
    """Rows that bring one tree, and the node at which each one's accepted path ends."""

    tree: Tree
    rows: list[int]
    last: list[int]
    block_size: int
    padding: int
    """Dummy rows beside them."""
    seed: int

    def state(self) -> RowState:
        """Every row filled, each with pages of its own, scattered; page 0 is the dummy's."""
        random = torch.Generator().manual_seed(self.seed)
        state = RowState(ROWS, MAX_LEN, self.block_size, HEADS, RANKS, 50, CPU)
        state.cached_len[:] = torch.randint(0, MAX_LEN, (ROWS + 1,), generator=random)
        state.cached_len[-1] = 0
        state.drafts[:] = torch.randint(0, 50, state.drafts.shape, generator=random)
        pages = state.block_table[:-1]
        pages[:] = 1 + torch.randperm(pages.numel(), generator=random).view(pages.shape)
        return state

    def cache(self, state: RowState, kv_heads: int = 2, dim: int = 3) -> Tensor:
        """[layers, 2, pages, page size, kv_heads, dim], no two entries alike."""
        shape = (2, 2, state.block_table[:-1].numel() + 1, self.block_size, kv_heads, dim)
        return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)

    @property
    def index(self) -> list[int]:
        return self.rows + [ROWS] * self.padding

    def path(self, r: int) -> list[int]:
        choice = self.tree.choices[self.last[r]]
        return [self.tree.choices.index(choice[:d]) for d in range(len(choice) + 1)]

    def verdict(self) -> Verdict:
        """Dummy rows keep their root; what follows a path's end means nothing, and is the last node or anything."""
        random = torch.Generator().manual_seed(self.seed + 1)
        paths = [self.path(r) for r in range(len(self.rows))] + [[0]] * self.padding
        width = self.tree.max_depth + 1
        return Verdict(
            last=torch.tensor([path[-1] for path in paths]),
            num_accepted=torch.tensor([len(path) for path in paths]),
            path=torch.tensor([path + path[-1:] * (width - len(path)) for path in paths]),
            emitted=torch.randint(0, 50, (len(paths), width), generator=random),
        )

    def slots(self, state: RowState, row: int) -> list[int]:
        """The cache slots of its in-flight tokens."""
        first, size = int(state.cached_len[row]), self.block_size
        positions = range(first, first + self.tree.num_nodes)
        return [int(state.block_table[row, p // size]) * size + p % size for p in positions]

    def moved(self, cache: Tensor, state: RowState) -> Tensor:
        """What the cache should hold after the step: paths at the front, all else as it was."""
        wanted = cache.clone()
        old, new = cache.flatten(2, 3), wanted.flatten(2, 3)
        for r, row in enumerate(self.rows):
            slots = self.slots(state, row)
            for depth, node in enumerate(self.path(r)):
                new[:, :, slots[depth]] = old[:, :, slots[node]]
        return new.view(cache.shape)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    choices: list[Choice] = [()]
    for _ in range(draw(st.integers(0, 30))):
        parent = draw(st.sampled_from([c for c in choices if len(c) < HEADS]))
        choice = (*parent, draw(st.integers(0, RANKS - 1)))
        if choice not in choices:
            choices.append(choice)
    rows = draw(st.permutations(range(ROWS)))[: draw(st.integers(1, ROWS))]
    last = [draw(st.integers(0, len(choices) - 1)) for _ in rows]
    return Case(
        Tree(tuple(choices)), rows, last, draw(st.integers(1, 5)), draw(st.integers(0, 2)), draw(st.integers(0, 99))
    )


@settings(max_examples=200, deadline=None)
@given(cases())
def test_a_tree_is_filled_from_its_draft_and_placed_after_the_prefix(case: Case) -> None:
    state = case.state()
    rows = expand(state, torch.tensor(case.index), tree_tensors(case.tree, RANKS, CPU))
    assert (rows.num_rows, rows.num_nodes) == (len(case.index), case.tree.num_nodes)
    for r, row in enumerate(case.rows):
        candidates = state.candidates[row].view(HEADS, RANKS)
        assert rows.tokens[r].tolist() == [
            int(candidates[len(c) - 1, c[-1]]) if c else int(state.last_token[row]) for c in case.tree.choices
        ]
        assert rows.position[r].tolist() == [int(state.cached_len[row]) + len(c) for c in case.tree.choices]
        assert rows.slots[r].tolist() == case.slots(state, row)
    assert bool((rows.slots[len(case.rows) :] // case.block_size == 0).all()), "dummy rows write the dummy page"


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("cached", [0, 3, 4, 21])
def test_known_tokens_are_placed_one_after_the_other(n: int, cached: int) -> None:
    case = Case(Tree(tuple((0,) * d for d in range(n))), [2], [0], 4, 0, 0)
    state = case.state()
    state.cached_len[2] = cached
    tokens = torch.randint(0, 50, (1, n))
    rows = place(state, torch.tensor([2]), chain_tensors(n, CPU), tokens)
    assert torch.equal(rows.tokens, tokens)
    assert rows.position.tolist() == [list(range(cached, cached + n))]
    assert rows.slots.tolist() == [case.slots(state, 2)]


@settings(max_examples=200, deadline=None)
@given(cases())
def test_a_row_moves_on_by_what_was_accepted(case: Case) -> None:
    state, before = case.state(), case.state()
    cache = case.cache(state)
    wanted = case.moved(cache, state)
    rows = expand(state, torch.tensor(case.index), tree_tensors(case.tree, RANKS, CPU))
    verdict = case.verdict()
    report = advance(state, cache, rows, verdict)

    assert torch.equal(cache, wanted)
    width = case.tree.max_depth + 1
    assert report.shape == (len(case.index), 1 + 2 * width + HEADS * RANKS)
    for r, row in enumerate(case.rows):
        path = case.path(r)
        assert int(state.cached_len[row]) == int(before.cached_len[row]) + len(path)
        assert int(state.last_token[row]) == int(verdict.emitted[r, len(path) - 1])
        gained, *others = report[r].tolist()
        assert gained == len(path)
        assert others[:gained] == verdict.emitted[r, :gained].tolist()
        assert others[width:][:gained] == path
        assert others[2 * width :] == before.candidates[row].tolist()
    assert torch.equal(state.candidates, before.candidates)
    assert torch.equal(state.block_table, before.block_table)
    for row in set(range(ROWS)) - set(case.rows):
        assert state.cached_len[row] == before.cached_len[row]
        assert torch.equal(state.drafts[row], before.drafts[row])


def test_a_path_may_move_into_places_that_it_leaves() -> None:
    """Nodes 2, 3 and 5 go to 1, 2 and 3."""
    tree = Tree(((), (0,), (1,), (1, 0), (0, 0), (1, 0, 0)))
    check_compaction(Case(tree, [1, 3], [5, 4], 4, 0, 0), through_advance)


def through_advance(cache: Tensor, rows: InFlight, verdict: Verdict, state: RowState) -> Tensor:
    advance(state, cache, rows, verdict)
    return cache


def through_kernel(cache: Tensor, rows: InFlight, verdict: Verdict, state: RowState) -> Tensor:
    from manyheads.kernels.compact import compact

    cache = cache.to(DEVICE)
    compact(cache, *(x.to(DEVICE) for x in (rows.slots, verdict.path, verdict.num_accepted)))
    return cache.cpu()


def check_compaction(
    case: Case, compacted: Callable[[Tensor, InFlight, Verdict, RowState], Tensor], kv_heads: int = 2, dim: int = 3
) -> None:
    state = case.state()
    cache = case.cache(state, kv_heads, dim)
    wanted = case.moved(cache, state)
    rows = expand(state, torch.tensor(case.index), tree_tensors(case.tree, RANKS, CPU))
    assert torch.equal(compacted(cache, rows, case.verdict(), state), wanted)


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


@needs_triton
@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_kernel_moves_the_same(case: Case) -> None:
    check_compaction(case, through_kernel)


@needs_triton
@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 1), (2, 64), (8, 128), (8, 129), (3, 700)])
def test_the_kernel_moves_entries_of_any_size(kv_heads: int, dim: int) -> None:
    """A program moves 1024 elements: parts of a block, one and more."""
    tree = Tree(((), (0,), (1,), (1, 0), (0, 0), (1, 0, 0)))
    check_compaction(Case(tree, [4, 0, 1], [5, 4, 2], 3, 1, 1), through_kernel, kv_heads, dim)
