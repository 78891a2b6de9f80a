"""From a row's draft to its tree, and from the verdict to its next state, against plain Python."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyheads.engine.decode import Trees, advance, chain, expand, last_token, verify
from manyheads.engine.state import RowState
from manyheads.kv_cache import CODES, KVCache
from manyheads.speculation.tree import ROOT, Choice, Tree, tree_tensors
from manyheads.speculation.verify import Verdict
from tests.kernels import DEVICE

CPU = torch.device("cpu")
HEADS, RANKS, ROWS, MAX_LEN = 4, 3, 5, 40


@dataclass(frozen=True)
class Case:
    """Rows that share a tree, and how many tokens they bring in all."""

    tree: Tree
    rows: list[int]
    share: float
    """Of the nodes below the roots, as many are brought."""
    block_size: int
    padding: int
    """Dummy rows beside them."""
    seed: int
    levels: int = 0
    """So many different chances there are, 0 among them; 0 is any."""
    vocab: int = 50
    kv_dtype: torch.dtype | None = None
    """Of a cache in 8 bits."""

    def state(self) -> RowState:
        """Every row filled, each with pages of its own, scattered; page 0 is the dummy's."""
        random = torch.Generator().manual_seed(self.seed)
        state = RowState(ROWS, MAX_LEN, self.block_size, HEADS, RANKS, self.vocab, CPU)
        state.cached_len[:] = torch.randint(0, MAX_LEN, (ROWS + 1,), generator=random)
        state.cached_len[-1] = 0
        state.drafts[:] = torch.randint(0, self.vocab, state.drafts.shape, generator=random)
        pages = state.block_table[:-1]
        pages[:] = 1 + torch.randperm(pages.numel(), generator=random).view(pages.shape)
        chances = state.chances[:-1, 1:]
        chances[:] = torch.rand(chances.shape, generator=random)
        if self.levels:
            chances[:] = (chances * self.levels).floor() / max(self.levels - 1, 1)
        return state

    def cache(self, state: RowState, kv_heads: int = 2, dim: int = 3) -> KVCache:
        """No two entries alike, nor two scales; in 8 bits, two neighbours."""
        shape = torch.Size((2, 2, state.block_table[:-1].numel() + 1, self.block_size, kv_heads))
        data = torch.arange(shape.numel() * dim, dtype=torch.float32).view(*shape, dim)
        if self.kv_dtype is None:
            return KVCache(data)
        return KVCache((data % 119).to(self.kv_dtype), torch.arange(shape.numel(), dtype=torch.float32).view(shape))

    def expand(self, state: RowState) -> Trees:
        tree = tree_tensors(self.tree, RANKS, CPU)
        sizes = torch.arange(len(self.index), len(self.index) * tree.num_nodes + 1)
        return expand(state, torch.tensor(self.index), tree, self.num_tokens, sizes)

    @property
    def index(self) -> list[int]:
        return self.rows + [ROWS] * self.padding

    @property
    def num_tokens(self) -> int:
        return len(self.index) + int(self.share * len(self.index) * (self.tree.num_nodes - 1))

    def value(self, state: RowState, r: int, choice: Choice) -> float:
        """The probability of a node."""
        chances = state.chances[self.index[r], 1:].view(HEADS, RANKS)
        return math.prod(float(chances[depth, rank]) for depth, rank in enumerate(choice))

    def token(self, state: RowState, r: int, choice: Choice) -> int:
        draft = state.drafts[self.index[r]].tolist()
        return draft[0] if choice == () else draft[1 + RANKS * (len(choice) - 1) + choice[-1]]

    def slot(self, state: RowState, r: int, place: int) -> int:
        row, size = self.index[r], self.block_size
        position = int(state.cached_len[row]) + place
        return int(state.block_table[row, position // size]) * size + position % size


def brought(case: Case, trees: Trees) -> list[list[Choice]]:
    """The nodes of each row's tokens, in order."""
    found: list[list[Choice]] = [[] for _ in case.index]
    for row, node in zip(trees.row.tolist(), trees.node.tolist(), strict=True):
        found[row].append(case.tree.choices[node])
    return found


def taken(case: Case, trees: Trees) -> list[list[Choice]]:
    return [[c for c, t in zip(case.tree.choices, row, strict=True) if t] for row in trees.taken.tolist()]


@st.composite
def cases(draw: st.DrawFn, vocab: int = 50) -> Case:
    choices: list[Choice] = [()]
    for _ in range(draw(st.integers(0, 63))):
        parent = draw(st.sampled_from([c for c in choices if len(c) < HEADS]))
        choice = (*parent, draw(st.integers(0, RANKS - 1)))
        if choice not in choices:
            choices.append(choice)
    return Case(
        Tree(tuple(choices)),
        draw(st.permutations(range(ROWS)))[: draw(st.integers(1, ROWS))],
        draw(st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1))),
        draw(st.integers(1, 5)),
        draw(st.integers(0, 2)),
        draw(st.integers(0, 99)),
        draw(st.integers(0, 4)),
        vocab,
        draw(st.sampled_from([None, *CODES.values()])),
    )


@settings(max_examples=300, deadline=None)
@given(cases())
def test_a_batch_brings_its_roots_and_its_most_probable_nodes(case: Case) -> None:
    state = case.state()
    trees = case.expand(state)
    found = brought(case, trees)
    assert trees.row.tolist() == sorted(trees.row.tolist())
    assert sum(map(len, found)) == case.num_tokens
    values: list[float] = []
    for r, nodes in enumerate(found):
        assert nodes[0] == ()
        assert nodes == [c for c in case.tree.choices if c in set(nodes)], "each once, in the tree's order"
        assert all(c[:-1] in nodes for c in nodes)
        values += [case.value(state, r, c) for c in nodes[1:]]
    everyones = (case.value(state, r, c) for r in range(len(case.index)) for c in case.tree.choices[1:])
    best = sorted(everyones, reverse=True)
    assert sorted(values, reverse=True) == pytest.approx(best[: len(values)], rel=1e-5)

    # what so many tokens promise: nothing as long as they are roots
    wanted = [0.0]
    for value in best:
        wanted.append(wanted[-1] + value)
    if case.tree == ROOT:
        assert trees.gains is None
    else:
        assert trees.gains is not None
        assert trees.gains.tolist() == pytest.approx(wanted, abs=1e-4)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_tokens_are_filled_from_the_draft_and_placed_after_the_prefix(case: Case) -> None:
    state = case.state()
    trees = case.expand(state)
    inflight, start = trees.inflight, 0
    assert inflight.index.tolist() == case.index
    assert inflight.row_start.dtype == torch.int32
    for r, (nodes, accepted) in enumerate(zip(brought(case, trees), taken(case, trees), strict=True)):
        here = slice(start, start + len(nodes))
        cached = int(state.cached_len[case.index[r]])
        assert inflight.row_start[r : r + 2].tolist() == [here.start, here.stop]
        assert inflight.tokens[here].tolist() == [case.token(state, r, c) for c in nodes]
        assert inflight.position[here].tolist() == [cached + len(c) for c in nodes]
        assert inflight.slots[here].tolist() == [case.slot(state, r, i) for i in range(len(nodes))]
        above = [[i for i, c in enumerate(nodes) if choice[: len(c)] == c] for choice in nodes]
        assert [[i for i in range(64) if bits >> i & 1] for bits in inflight.bits[here].tolist()] == above
        assert accepted == [c for c in nodes if c == () or case.value(state, r, c) > 0]
        for node, choice in enumerate(case.tree.choices):
            assert int(trees.node_tokens[r, node]) == case.token(state, r, choice)
            assert int(trees.place[r, node]) == start + (nodes.index(choice) if choice in accepted else 0)
            if choice in nodes:
                assert int(trees.rank[r, node]) == nodes.index(choice)
        assert trees.row_slots[r].tolist() == [case.slot(state, r, i) for i in range(case.tree.num_nodes)]
        start += len(nodes)
    assert start == len(inflight.tokens)
    assert bool((trees.row_slots[len(case.rows) :] // case.block_size == 0).all()), "dummy rows write the dummy page"
    assert all(nodes == [()] for nodes in taken(case, trees)[len(case.rows) :])


def test_64_nodes_of_one_row() -> None:
    """The last one's bit is the sign."""
    state = RowState(1, 100, 4, 63, 1, 99, CPU)
    state.propose(torch.tensor([0]), torch.arange(63).view(1, 63, 1), torch.ones(1, 63, 1))
    state.speculative[:] = 1.0
    state.propose(torch.tensor([0]), torch.arange(63).view(1, 63, 1), torch.ones(1, 63, 1))
    tree = tree_tensors(Tree(tuple((0,) * depth for depth in range(64))), 1, CPU)
    trees = expand(state, torch.tensor([0]), tree, 64, torch.tensor([1, 64]))
    assert torch.equal(trees.inflight.bits, tree.bits)
    assert bool(trees.taken.all())
    assert trees.gains is not None
    assert trees.gains.tolist() == [0, 63]


@pytest.mark.parametrize("num_tokens", [3, 5, 9, 30, 39])
def test_a_row_that_declines_speculation_brings_its_root(num_tokens: int) -> None:
    state = Case(ROOT, [], 0.0, 4, 0, 0).state()
    below = [*((r,) for r in range(3)), *((0, r) for r in range(3)), *((1, r) for r in range(3))]
    tree = tree_tensors(Tree(((), *below, (0, 0, 0), (0, 0, 1), (1, 0, 0))), RANKS, CPU)
    state.forget_proposals(torch.arange(ROWS))
    state.speculative[:] = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    index = torch.tensor([3, 1, 0])
    candidates = torch.randint(0, 50, (3, HEADS, RANKS))
    state.propose(index, candidates, torch.full((3, HEADS, RANKS), 0.3))
    assert torch.equal(state.candidates[index], candidates.flatten(1))
    assert state.chances[[2, 4, 5], 1:].count_nonzero() == 0
    assert bool((state.chances[:, 0] == 1).all())
    trees = expand(state, index, tree, num_tokens)
    counts = trees.taken.sum(1).tolist()
    assert counts[1] == 1
    assert counts[0] + counts[2] + 1 == min(num_tokens, 27)  # only where no one else has more does it fill up
    state.forget_proposals(index)
    trees = expand(state, index, tree, num_tokens, torch.tensor([3, 9, 39]))
    assert trees.taken.sum(1).tolist() == [1, 1, 1]
    assert trees.gains is not None
    assert trees.gains.tolist() == [0, 0, 0]


@pytest.mark.parametrize("n", [1, 2, 9, 100])
@pytest.mark.parametrize("cached", [0, 3, 4, 21])
def test_known_tokens_are_placed_one_after_the_other(n: int, cached: int) -> None:
    case = Case(ROOT, [2], 0.0, 4, 0, 0)
    state = case.state()
    state.cached_len[2] = cached
    n = min(n, state.block_table.shape[1] * 4 - cached)
    tokens = torch.randint(0, 50, (n,))
    inflight = chain(state, torch.tensor([2]), tokens)
    assert torch.equal(inflight.tokens, tokens)
    assert inflight.index.tolist() == [2]
    assert inflight.row_start.tolist() == [0, n]
    assert inflight.position.tolist() == list(range(cached, cached + n))
    assert inflight.slots.tolist() == [case.slot(state, 0, i) for i in range(n)]
    assert inflight.bits.tolist() == [0] * n


def walk(nodes: list[Choice], holds: Callable[[Choice], bool]) -> list[Choice]:
    """The longest path all of whose nodes hold; of equals, the earlier node's."""
    best: list[Choice] = [()]
    for choice in nodes:
        path = [choice[:d] for d in range(len(choice) + 1)]
        if len(path) > len(best) and all(map(holds, path[1:])):
            best = path
    return best


@settings(max_examples=300, deadline=None)
@given(cases(vocab=2), st.booleans())
def test_the_longest_path_that_a_row_brought_is_accepted(case: Case, lossy: bool) -> None:
    state = case.state()
    trees = case.expand(state)
    random = torch.Generator().manual_seed(case.seed + 1)
    target = torch.randint(0, 2, (case.num_tokens,), generator=random)
    accepted = torch.rand(trees.taken.shape, generator=random) < 0.7 if lossy else None
    verdict = verify(trees, target, accepted)
    places = last_token(trees, verdict).tolist()
    for r, (nodes, may) in enumerate(zip(brought(case, trees), taken(case, trees), strict=True)):
        drawn = dict(zip(nodes, target[trees.row == r].tolist(), strict=True))

        def holds(choice: Choice, r: int = r, drawn: dict[Choice, int] = drawn) -> bool:
            if accepted is not None:
                return bool(accepted[r, case.tree.choices.index(choice)])
            return drawn[choice[:-1]] == case.token(state, r, choice)

        path = walk(may, holds)
        gained = int(verdict.num_accepted[r])
        assert [case.tree.choices[node] for node in verdict.path[r, :gained].tolist()] == path
        emitted = [*(case.token(state, r, c) for c in path[1:]), drawn[path[-1]]]
        assert verdict.emitted[r, :gained].tolist() == emitted
        assert places[r] == int(trees.inflight.row_start[r]) + nodes.index(path[-1])


def some_verdict(case: Case, trees: Trees) -> Verdict:
    """Paths to any node that the row may accept; what follows a path's end is its last node, or means nothing."""
    random = torch.Generator().manual_seed(case.seed + 1)
    last = []
    for r in range(len(case.index)):
        nodes = trees.taken[r].nonzero()[:, 0]
        last.append(int(nodes[int(torch.randint(0, len(nodes), (), generator=random))]))
    tensors, where = trees.tree, torch.tensor(last)
    return Verdict(
        last=where,
        num_accepted=tensors.depth[where] + 1,
        path=tensors.path[where],
        emitted=torch.randint(0, 50, (len(last), tensors.max_depth + 1), generator=random),
    )


def paths(case: Case, verdict: Verdict) -> list[list[Choice]]:
    ends = [case.tree.choices[node] for node in verdict.last.tolist()]
    return [[end[:d] for d in range(len(end) + 1)] for end in ends]


def contents(cache: KVCache) -> list[Tensor]:
    """Copies of the entries and, in 8 bits, of their scales."""
    return [cache.data.float().cpu().clone()] + ([] if cache.scale is None else [cache.scale.cpu().clone()])


def same(found: KVCache, wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(contents(found), wanted, strict=True))


def moved(case: Case, cache: KVCache, state: RowState, trees: Trees, verdict: Verdict) -> list[Tensor]:
    """What the cache should hold after the step: paths at the front, all else as it was."""
    wanted = contents(cache)
    for before, after in zip(contents(cache), wanted, strict=True):
        old, new = before.flatten(2, 3), after.flatten(2, 3)
        for r, (nodes, path) in enumerate(zip(brought(case, trees), paths(case, verdict), strict=True)):
            for depth, choice in enumerate(path):
                new[:, :, case.slot(state, r, depth)] = old[:, :, case.slot(state, r, nodes.index(choice))]
    return wanted


@settings(max_examples=300, deadline=None)
@given(cases())
def test_a_row_moves_on_by_what_was_accepted(case: Case) -> None:
    state, before = case.state(), case.state()
    cache = case.cache(state)
    trees = case.expand(state)
    verdict = some_verdict(case, trees)
    wanted = moved(case, cache, state, trees, verdict)
    report = advance(state, cache, trees, verdict)

    assert same(cache, wanted)
    width = case.tree.max_depth + 1
    assert report.shape == (len(case.index), 3 + 2 * width + HEADS * RANKS)
    may = taken(case, trees)
    for r, (row, path) in enumerate(zip(case.index, paths(case, verdict), strict=True)):
        gained, num_brought, deepest, *others = report[r].tolist()
        assert (gained, num_brought, deepest) == (len(path), len(may[r]), max(map(len, may[r])))
        assert others[:gained] == verdict.emitted[r, :gained].tolist()
        assert [case.tree.choices[node] for node in others[width:][:gained]] == path
        assert others[2 * width :] == before.candidates[row].tolist()
        if row != ROWS:
            assert int(state.cached_len[row]) == int(before.cached_len[row]) + len(path)
            assert int(state.drafts[row, 0]) == int(verdict.emitted[r, len(path) - 1])
    assert torch.equal(state.candidates, before.candidates)
    assert torch.equal(state.chances, before.chances)
    assert torch.equal(state.block_table, before.block_table)
    for row in set(range(ROWS)) - set(case.rows):
        assert state.cached_len[row] == before.cached_len[row]
        assert torch.equal(state.drafts[row], before.drafts[row])


CROSSING = Tree(((), (0,), (1,), (1, 0), (0, 0), (1, 0, 0)))


def verdict_at(case: Case, last: list[int]) -> Verdict:
    tensors, where = tree_tensors(case.tree, RANKS, CPU), torch.tensor(last)
    path = tensors.path[where]
    return Verdict(where, tensors.depth[where] + 1, path, torch.zeros_like(path))


def test_a_path_may_move_into_places_that_it_leaves() -> None:
    """Nodes 2, 3 and 5 go to 1, 2 and 3."""
    case = Case(CROSSING, [1, 3], 1.0, 4, 0, 0)
    check_compaction(case, through_advance, verdict_at(case, [5, 4]))


def through_advance(cache: KVCache, trees: Trees, verdict: Verdict, state: RowState) -> KVCache:
    advance(state, cache, trees, verdict)
    return cache


def through_kernel(cache: KVCache, trees: Trees, verdict: Verdict, state: RowState) -> KVCache:
    """As `advance` calls it on a GPU."""
    from manyheads.kernels.compact import compact

    cache = KVCache(cache.data.to(DEVICE), None if cache.scale is None else cache.scale.to(DEVICE))
    path = trees.rank.gather(1, verdict.path)
    compact(cache, *(x.to(DEVICE) for x in (trees.row_slots, path, verdict.num_accepted)))
    return cache


def check_compaction(
    case: Case,
    compacted: Callable[[KVCache, Trees, Verdict, RowState], KVCache],
    verdict: Verdict | None = None,
    kv_heads: int = 2,
    dim: int = 3,
) -> None:
    state = case.state()
    cache = case.cache(state, kv_heads, dim)
    trees = case.expand(state)
    verdict = verdict or some_verdict(case, trees)
    wanted = moved(case, cache, state, trees, verdict)
    assert same(compacted(cache, trees, verdict, state), wanted)


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


@needs_triton
@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_kernel_moves_the_same(case: Case) -> None:
    check_compaction(case, through_kernel)


@needs_triton
@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 1), (2, 64), (8, 128), (8, 129), (3, 700)])
@pytest.mark.parametrize("kv_dtype", [None, *CODES.values()])
def test_the_kernel_moves_entries_of_any_size(kv_dtype: torch.dtype | None, kv_heads: int, dim: int) -> None:
    """A program moves 1024 elements: parts of a block, one and more."""
    case = Case(CROSSING, [4, 0, 1], 1.0, 3, 1, 1, kv_dtype=kv_dtype)
    check_compaction(case, through_kernel, verdict_at(case, [5, 4, 2, 0]), kv_heads, dim)
