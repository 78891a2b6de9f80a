from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.batch import MAX_NODES
from manyheads.speculation.tree import ROOT, Choice, Tree, grow
from tests.trees import medusa_tensors

CPU = torch.device("cpu")
RANKS = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=3)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Any tree of up to 20 nodes; ranks may have gaps, siblings any order."""
    choices: list[Choice] = [()]
    for i in range(draw(st.integers(0, 19))):
        choice = (*choices[draw(st.integers(0, i))], draw(st.integers(0, 4)))
        if choice not in choices:
            choices.append(choice)
        else:
            choices.append((*choices[-1], 0))
    return Tree(tuple(choices))


@settings(max_examples=100, deadline=None)
@given(trees())
def test_tensors_say_what_the_choices_say(tree: Tree) -> None:
    tensors = medusa_tensors(tree, 5, CPU)
    n, choices = tree.num_nodes, tree.choices
    assert tensors.depth.tolist() == [len(c) for c in choices]
    assert [choices[p] for p in tensors.parent] == [c[:-1] for c in choices]
    # j is i or above it if j's choice is a beginning of i's
    assert tensors.ancestors.tolist() == [[choices[i][: len(c)] == c for c in choices] for i in range(n)]
    draft = ["last token", *((head, rank) for head in range(tree.max_depth) for rank in range(5))]
    assert [draft[c] for c in tensors.column] == ["last token", *((len(c) - 1, c[-1]) for c in choices[1:])]
    for i, path in enumerate(tensors.path.tolist()):
        below = [choices[node] for node in path]
        assert below == [choices[i][:d] for d in range(tree.max_depth + 1)]  # a slice past the end is i itself


@settings(max_examples=100, deadline=None)
@given(trees())
def test_an_accepted_path_moves_to_the_front_without_overwriting_itself(tree: Tree) -> None:
    tensors = medusa_tensors(tree, 5, CPU)
    assert bool((torch.arange(tree.num_nodes) >= tensors.depth).all())
    for path, depth in zip(tensors.path.tolist(), tensors.depth.tolist(), strict=True):
        slots = list(range(tree.num_nodes))
        for to, node in enumerate(path[: depth + 1]):
            slots[to] = slots[node]
        assert slots[: depth + 1] == path[: depth + 1]


def test_the_root_alone() -> None:
    tensors = medusa_tensors(ROOT, 10, CPU)
    assert (ROOT.num_nodes, ROOT.max_depth, ROOT.max_rank) == (1, 0, -1)
    assert tensors.column.tolist() == [0]
    assert tensors.order.tolist() == [0]
    assert tensors.ancestors.tolist() == [[True]]
    assert tensors.path.tolist() == [[0]]


@pytest.mark.parametrize("shape", ["chain", "star", "mixed"])
def test_the_largest_tree_fits_its_bits(shape: str) -> None:
    """Bit 63 is the sign."""
    choices: list[Choice] = [()]
    for i in range(MAX_NODES - 1):
        parent = {"chain": i, "star": 0, "mixed": i // 3}[shape]
        choices.append((*choices[parent], i % 3 if shape == "mixed" else i if shape == "star" else 0))
    tensors = medusa_tensors(Tree(tuple(choices)), 64, CPU)
    above = [[choices[i][: len(c)] == c for c in choices] for i in range(MAX_NODES)]
    assert tensors.ancestors.tolist() == above
    assert [[bits >> j & 1 == 1 for j in range(64)] for bits in tensors.bits.tolist()] == above


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ((), "starts with its root"),
        (((0,), ()), "starts with its root"),
        (((), (0, 1)), "before its parent"),
        (((), (0, 1), (0,)), "before its parent"),
        (((), (0,), (0,)), "twice"),
        (((), ()), "twice"),
    ],
)
def test_what_is_no_tree_is_refused(choices: tuple[Choice, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tree(choices)


@settings(max_examples=100, deadline=None)
@given(st.lists(RANKS, min_size=1, max_size=3), st.integers(1, 45))
def test_growing_takes_the_best_products(acceptance: list[list[float]], size: int) -> None:
    """In any order of ranks; `Tree` itself checks that parents come before children."""
    every = {
        choice: math.prod(acceptance[d][rank] for d, rank in enumerate(choice))
        for depth in range(len(acceptance) + 1)
        for choice in product(*(range(len(ranks)) for ranks in acceptance[:depth]))
    }
    tree, probabilities = grow(acceptance, size)
    assert tree.num_nodes == len(probabilities) == min(size, len(every))
    assert probabilities == pytest.approx([every[c] for c in tree.choices])
    assert probabilities == pytest.approx(sorted(every.values(), reverse=True)[:size])


@settings(max_examples=30, deadline=None)
@given(st.lists(RANKS, min_size=1, max_size=4), st.integers(1, MAX_NODES))
def test_smaller_trees_are_prefixes(acceptance: list[list[float]], size: int) -> None:
    (large, p), (small, q) = grow(acceptance, MAX_NODES), grow(acceptance, size)
    assert (small.choices, q) == (large.choices[:size], p[:size])


def test_what_never_holds_does_not_grow() -> None:
    assert grow([[0.5, 0.0], [0.0]], 10)[0].choices == ((), (0,))
    assert grow([], 10) == (ROOT, [1.0])
