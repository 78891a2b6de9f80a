"""From a row's draft to its tree, against plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from manyheads.batch import RowState, TreeTensors
from manyheads.speculation.tree import ROOT, Tree
from tests.ops.rows import CPU, HEADS, OPS, RANKS, ROWS, Case, brought, cases, taken
from tests.trees import medusa_tensors


@settings(max_examples=120, deadline=None)
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


@settings(max_examples=120, deadline=None)
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
                assert int(trees.offset[r, node]) == nodes.index(choice)
        assert trees.row_slots[r].tolist() == [case.slot(state, r, i) for i in range(case.tree.num_nodes)]
        start += len(nodes)
    assert start == len(inflight.tokens)
    assert bool((trees.row_slots[len(case.rows) :] // case.page_size == 0).all()), "dummy rows write the dummy page"
    assert all(nodes == [()] for nodes in taken(case, trees)[len(case.rows) :])


def test_64_nodes_of_one_row() -> None:
    """The last one's bit is the sign."""
    state = RowState(1, 100, 4, 63, 99, CPU)
    candidates, chances = torch.arange(63).view(1, 63), torch.ones(1, 63)
    OPS.propose(state, torch.tensor([0]), candidates, chances)
    assert not state.chances[:, 1:].any()  # the row declines
    state.speculative[:] = 1.0
    OPS.propose(state, torch.tensor([0]), candidates, chances)
    tree = medusa_tensors(Tree(tuple((0,) * depth for depth in range(64))), 1, CPU)
    trees = OPS.expand(state, torch.tensor([0]), tree, 64, torch.tensor([1, 64]))
    assert torch.equal(trees.inflight.bits, tree.bits)
    assert bool(trees.taken.all())
    assert trees.gains is not None
    assert trees.gains.tolist() == [0, 63]


@pytest.mark.parametrize("num_tokens", [3, 5, 9, 30, 39])
def test_a_row_that_declines_speculation_brings_its_root(num_tokens: int) -> None:
    state = Case(ROOT, [], 0.0, 4, 0, 0).state()
    below = [*((r,) for r in range(3)), *((0, r) for r in range(3)), *((1, r) for r in range(3))]
    tree = medusa_tensors(Tree(((), *below, (0, 0, 0), (0, 0, 1), (1, 0, 0))), RANKS, CPU)
    state.forget_candidates(torch.arange(ROWS))
    state.speculative[:] = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    index = torch.tensor([3, 1, 0])
    candidates = torch.randint(0, 50, (3, HEADS * RANKS))
    OPS.propose(state, index, candidates, torch.full((3, HEADS * RANKS), 0.3))
    assert torch.equal(state.candidates[index], candidates)
    assert state.chances[[2, 4, 5], 1:].count_nonzero() == 0
    assert bool((state.chances[:, 0] == 1).all())
    trees = OPS.expand(state, index, tree, num_tokens)
    counts = trees.taken.sum(1).tolist()
    assert counts[1] == 1
    assert counts[0] + counts[2] + 1 == min(num_tokens, 27)  # only where no one else has more does it fill up
    state.forget_candidates(index)
    trees = OPS.expand(state, index, tree, num_tokens, torch.tensor([3, 9, 39]))
    assert trees.taken.sum(1).tolist() == [1, 1, 1]
    assert trees.gains is not None
    assert trees.gains.tolist() == [0, 0, 0]


FORK = Tree(((), (0,), (1,), (0, 0), (1, 0), (0, 0, 0)))
CHAIN = Tree(((), (0,), (0, 0), (0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0, 0)))
STAR = Tree(((), *((rank,) for rank in range(5))))


def test_room_for_trees_becomes_one_tree_after_the_other() -> None:
    """A recorded step keeps its tensors, and what follows from them is that of the tree that is there now."""
    room = TreeTensors.blank(6, 5, CPU)
    there = [getattr(room, name).data_ptr() for name in ("parent", "depth", "column", "bits", "path")]
    for tree in (FORK, CHAIN, STAR, FORK):
        wanted = medusa_tensors(tree, 5, CPU)
        room.take(wanted)
        assert torch.equal(room.ancestors, wanted.ancestors)
        assert torch.equal(room.order, wanted.order)
        for name in ("parent", "depth", "column", "bits"):
            assert torch.equal(getattr(room, name), getattr(wanted, name))
        width = tree.max_depth + 1
        assert torch.equal(room.path[:, :width], wanted.path)
        assert torch.equal(room.path[:, width:], torch.arange(6)[:, None].expand(6, 6 - width))
    assert there == [getattr(room, name).data_ptr() for name in ("parent", "depth", "column", "bits", "path")]


def test_room_for_a_tree_is_roots_until_there_is_one() -> None:
    room = TreeTensors.blank(3, 2, CPU)
    assert (room.num_nodes, room.max_depth) == (3, 2)
    assert room.path.tolist() == [[0, 0, 0]] * 3
    assert room.bits.tolist() == [1, 1, 1]
