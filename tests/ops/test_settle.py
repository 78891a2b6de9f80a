"""From what the target drew to a row's next state, against plain Python."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyheads.batch import RowState, Trees
from manyheads.kv_cache import CODES, KVCache, as_bytes
from manyheads.speculation.tree import Choice, Tree
from tests.kernels import DEVICE
from tests.ops.rows import HEADS, OPS, RANKS, ROWS, Case, brought, cases, taken


def walk(nodes: list[Choice], holds: Callable[[Choice], bool]) -> list[Choice]:
    """The longest path all of whose nodes hold; of equals, the earlier node's."""
    best: list[Choice] = [()]
    for choice in nodes:
        path = [choice[:d] for d in range(len(choice) + 1)]
        if len(path) > len(best) and all(map(holds, path[1:])):
            best = path
    return best


@settings(max_examples=120, deadline=None)
@given(cases(vocab=2), st.booleans())
def test_the_longest_path_that_a_row_brought_is_accepted(case: Case, lossy: bool) -> None:
    state, before = case.state(), case.state()
    trees = case.expand(state)
    random = torch.Generator().manual_seed(case.seed + 1)
    target = torch.randint(0, 2, (case.num_tokens,), generator=random)
    accepted = torch.rand(trees.taken.shape, generator=random) < 0.7 if lossy else None
    outcome = OPS.settle(state, case.cache(state), trees, target, accepted)
    width = case.tree.max_depth + 1
    for r, (nodes, may) in enumerate(zip(brought(case, trees), taken(case, trees), strict=True)):
        drawn = dict(zip(nodes, target[trees.row == r].tolist(), strict=True))

        def holds(choice: Choice, r: int = r, drawn: dict[Choice, int] = drawn) -> bool:
            if accepted is not None:
                return bool(accepted[r, case.tree.choices.index(choice)])
            return drawn[choice[:-1]] == case.token(before, r, choice)

        path = walk(may, holds)
        gained, _, _, *others = outcome.values[r].tolist()
        assert [case.tree.choices[node] for node in others[width:][:gained]] == path
        emitted = [*(case.token(before, r, c) for c in path[1:]), drawn[path[-1]]]
        assert others[:gained] == emitted
        assert int(outcome.last[r]) == int(trees.inflight.row_start[r]) + nodes.index(path[-1])


def some_ends(case: Case, trees: Trees) -> list[int]:
    """For each row, any node that it may accept."""
    random = torch.Generator().manual_seed(case.seed + 1)
    ends = []
    for r in range(len(case.index)):
        nodes = trees.taken[r].nonzero()[:, 0]
        ends.append(int(nodes[int(torch.randint(0, len(nodes), (), generator=random))]))
    return ends


def accepting(trees: Trees, ends: list[int]) -> Tensor:
    """[R, n] bool: the nodes on the way to each row's end, and no others."""
    return trees.tree.ancestors[torch.tensor(ends)]


def paths(case: Case, ends: list[int]) -> list[list[Choice]]:
    choices = [case.tree.choices[node] for node in ends]
    return [[end[:d] for d in range(len(end) + 1)] for end in choices]


def contents(cache: KVCache) -> list[Tensor]:
    """Copies of the entries and, in 8 bits, of their scales."""
    return [cache.data.float().cpu().clone()] + ([] if cache.scale is None else [cache.scale.cpu().clone()])


def same(found: KVCache, wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(contents(found), wanted, strict=True))


def moved(case: Case, cache: KVCache, state: RowState, trees: Trees, ends: list[int]) -> list[Tensor]:
    """What the cache should hold after the step: paths at the front, all else as it was."""
    wanted = contents(cache)
    for before, after in zip(contents(cache), wanted, strict=True):
        old, new = before.flatten(2, 3), after.flatten(2, 3)
        for r, (nodes, path) in enumerate(zip(brought(case, trees), paths(case, ends), strict=True)):
            for depth, choice in enumerate(path):
                new[:, :, case.slot(state, r, depth)] = old[:, :, case.slot(state, r, nodes.index(choice))]
    return wanted


@settings(max_examples=120, deadline=None)
@given(cases())
def test_a_row_moves_on_by_what_was_accepted(case: Case) -> None:
    state, before = case.state(), case.state()
    cache = case.cache(state)
    trees = case.expand(state)
    ends = some_ends(case, trees)
    wanted = moved(case, cache, state, trees, ends)
    target = torch.randint(0, 50, (case.num_tokens,), generator=torch.Generator().manual_seed(case.seed + 2))
    report = OPS.settle(state, cache, trees, target, accepting(trees, ends)).values

    assert same(cache, wanted)
    width = case.tree.max_depth + 1
    assert report.shape == (len(case.index), 3 + 2 * width + HEADS * RANKS)
    may = taken(case, trees)
    for r, (row, path) in enumerate(zip(case.index, paths(case, ends), strict=True)):
        gained, num_brought, deepest, *others = report[r].tolist()
        assert (gained, num_brought, deepest) == (len(path), len(may[r]), max(map(len, may[r])))
        newest = int(target[trees.place[r, ends[r]]])
        assert others[:gained] == [*(case.token(before, r, choice) for choice in path[1:]), newest]
        assert [case.tree.choices[node] for node in others[width:][:gained]] == path
        assert others[2 * width :] == before.candidates[row].tolist()
        if row != ROWS:
            assert int(state.cached_len[row]) == int(before.cached_len[row]) + len(path)
            assert int(state.drafts[row, 0]) == newest
    assert int(state.cached_len[ROWS]) == 0
    assert torch.equal(state.candidates, before.candidates)
    assert torch.equal(state.chances, before.chances)
    assert torch.equal(state.page_table, before.page_table)
    for row in set(range(ROWS)) - set(case.rows):
        assert state.cached_len[row] == before.cached_len[row]
        assert torch.equal(state.drafts[row], before.drafts[row])


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(0, 5))
def test_what_rows_gained_is_packed(case: Case, more: int) -> None:
    """Each row's tokens behind the prefix that it had, and behind all rows some that mean nothing."""
    state, before = case.state(), case.state()
    trees = case.expand(state)
    ends = some_ends(case, trees)
    target = torch.randint(-1, 50, (case.num_tokens,), generator=torch.Generator().manual_seed(case.seed + 2))
    outcome = OPS.settle(state, case.cache(state), trees, target, accepting(trees, ends))
    total = int(outcome.values[:, 0].sum())
    gained = OPS.pack(state, trees, outcome, total + more)
    inflight, at = gained.inflight, 0
    assert inflight.index.tolist() == [*case.index, ROWS]
    for r, (row, path) in enumerate(zip(case.index, paths(case, ends), strict=True)):
        cached = int(before.cached_len[row])
        assert inflight.row_start[r] == at
        assert gained.cached_len[r] == cached
        for depth, choice in enumerate(path):
            place = int(trees.inflight.row_start[r]) + brought(case, trees)[r].index(choice)
            following = path[depth + 1] if depth + 1 < len(path) else None
            token = int(target[place]) if following is None else case.token(before, r, following)
            assert gained.place[at] == place
            assert inflight.tokens[at] == max(token, 0)
            assert inflight.position[at] == cached + depth
            assert inflight.slots[at] == case.slot(before, r, depth)
            assert inflight.bits[at] == 2 ** (depth + 1) - 1
            at += 1
        assert gained.last[r] == at - 1
    assert at == total
    assert inflight.row_start[-2:].tolist() == [total, total + more]
    assert gained.cached_len[-1] == 0
    for name, value in (("tokens", 0), ("position", 0), ("slots", 0), ("bits", 1)):
        assert getattr(inflight, name)[total:].tolist() == [value] * more
    assert gained.place[total:].tolist() == [0] * more


Compacted = Callable[[KVCache, Trees, list[int], RowState], KVCache]
CROSSING = Tree(((), (0,), (1,), (1, 0), (0, 0), (1, 0, 0)))


def test_a_path_may_move_into_places_that_it_leaves() -> None:
    """Nodes 2, 3 and 5 go to 1, 2 and 3."""
    case = Case(CROSSING, [1, 3], 1.0, 4, 0, 0)
    check_compaction(case, through_settle, [5, 4])


def through_settle(cache: KVCache, trees: Trees, ends: list[int], state: RowState) -> KVCache:
    OPS.settle(state, cache, trees, torch.zeros_like(trees.inflight.tokens), accepting(trees, ends))
    return cache


def through_kernel(cache: KVCache, trees: Trees, ends: list[int], state: RowState) -> KVCache:
    """As `TritonOps.compact` calls it on a GPU."""
    from manyheads.kernels.compact import compact

    tensors = {name: getattr(cache, name) for name in ("data", "scale", "companions")}
    cache = replace(cache, **{name: x.to(DEVICE) for name, x in tensors.items() if x is not None})
    last, tree = torch.tensor(ends), trees.tree
    places = trees.offset.gather(1, tree.path[last])
    compact(cache, *(x.to(DEVICE) for x in (trees.row_slots, places, tree.depth[last] + 1)))
    return cache


def check_compaction(
    case: Case,
    compacted: Compacted,
    ends: list[int] | None = None,
    kv_heads: int = 2,
    dim: int = 3,
) -> None:
    state = case.state()
    cache = case.cache(state, kv_heads, dim)
    trees = case.expand(state)
    ends = ends or some_ends(case, trees)
    wanted = moved(case, cache, state, trees, ends)
    assert same(compacted(cache, trees, ends, state), wanted)


def through_companions(compacted: Compacted) -> Compacted:
    """The same with a layer's entries on pages of the other one's: taken apart before, and put together behind."""

    def through(cache: KVCache, trees: Trees, ends: list[int], state: RowState) -> KVCache:
        count = cache.num_pages
        companions = torch.zeros(1, count, dtype=torch.int64)
        companions[0, 1:] = count + torch.randperm(count - 1, generator=torch.Generator().manual_seed(count))

        def apart(x: Tensor) -> Tensor:
            both = torch.zeros_like(x[:1]).repeat_interleave(2, dim=2)
            both[:, :, :count], both[:, :, companions[0, 1:]] = x[:1], x[1:, :, 1:]
            return both

        def together(x: Tensor) -> Tensor:
            return torch.cat((x[:, :, :count], x[:, :, companions[0].to(x.device)]))

        data, scale = (None if x is None else apart(as_bytes(x)) for x in (cache.data, cache.scale))
        assert data is not None
        grouped = KVCache(data.view(cache.data.dtype), scale, ((0,), (1,)), companions)
        done = compacted(grouped, trees, ends, state)
        data, scale = (None if x is None else together(as_bytes(x)) for x in (done.data, done.scale))
        assert data is not None
        data[1, :, 0], cached = as_bytes(cache.data).to(data.device)[1, :, 0], cache.scale  # the dummy page
        if scale is not None and cached is not None:
            scale[1, :, 0] = cached.to(scale.device)[1, :, 0]
        return KVCache(data.view(cache.data.dtype), scale)

    return through


@pytest.mark.parametrize("kv_dtype", [None, *CODES.values()])
def test_companions_move_with_their_pages(kv_dtype: torch.dtype | None) -> None:
    case = Case(CROSSING, [4, 0, 1], 1.0, 3, 1, 1, kv_dtype=kv_dtype)
    check_compaction(case, through_companions(through_settle), [5, 4, 2, 0])


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


@needs_triton
@settings(max_examples=30, deadline=None)
@given(cases())
def test_the_kernel_moves_the_same(case: Case) -> None:
    check_compaction(case, through_kernel)


@needs_triton
@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 1), (2, 64), (8, 128), (8, 129), (3, 700)])
@pytest.mark.parametrize("kv_dtype", [None, *CODES.values()])
def test_the_kernel_moves_entries_of_any_size(kv_dtype: torch.dtype | None, kv_heads: int, dim: int) -> None:
    """A program moves 1024 elements: parts of a block, one and more."""
    case = Case(CROSSING, [4, 0, 1], 1.0, 3, 1, 1, kv_dtype=kv_dtype)
    check_compaction(case, through_kernel, [5, 4, 2, 0], kv_heads, dim)


@needs_triton
@pytest.mark.parametrize("kv_dtype", [None, *CODES.values()])
def test_the_kernel_moves_companions_too(kv_dtype: torch.dtype | None) -> None:
    case = Case(CROSSING, [4, 0, 1], 1.0, 3, 1, 1, kv_dtype=kv_dtype)
    check_compaction(case, through_companions(through_kernel), [5, 4, 2, 0])
