"""The walk down a tree, and the rule that a node is accepted where it holds what the target drew."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from manyheads.batch import Outcome, RowState, TreeTensors
from manyheads.kv_cache import KVCache
from manyheads.ops.torch import longest_path
from manyheads.speculation.tree import ROOT, Tree
from tests.ops.rows import CPU, OPS
from tests.trees import medusa_tensors


class Case(NamedTuple):
    tree: Tree
    tokens: list[list[int]]
    target: list[list[int]]
    accepted: list[list[bool]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Rows that share a tree, over a vocabulary so small that paths of some length hold, and ties come up."""
    parents = [draw(st.integers(0, i)) for i in range(draw(st.integers(0, 14)))]
    choices: list[tuple[int, ...]] = [()]
    for rank, parent in enumerate(parents):
        choices.append((*choices[parent], rank))

    def rows(values: st.SearchStrategy) -> list:
        shape = st.lists(values, min_size=len(choices), max_size=len(choices))
        return [draw(shape) for _ in range(num_rows)]

    num_rows = draw(st.integers(1, 3))
    return Case(Tree(tuple(choices)), rows(st.integers(0, 1)), rows(st.integers(0, 1)), rows(st.booleans()))


def naive(tree: Tree, tokens: list[int], target: list[int], accepted: list[bool]) -> tuple[list[int], list[int]]:
    """The nodes of the longest accepted path (of the first of equals), and the tokens gained."""
    best: list[int] = []
    for choice in tree.choices:
        path = [tree.choices.index(choice[:d]) for d in range(len(choice) + 1)]
        if all(accepted[node] for node in path[1:]) and len(path) > len(best):
            best = path
    return best, [*(tokens[node] for node in best[1:]), target[best[-1]]]


def check(last: Tensor, paths: Tensor, gained: Tensor, case: Case, accepted: list[list[bool]]) -> None:
    for r, end in enumerate(last.tolist()):
        path, emitted = naive(case.tree, case.tokens[r], case.target[r], accepted[r])
        n = len(case.tree.choices[end]) + 1
        assert paths[r, :n].tolist() == path
        assert set(paths[r, n:].tolist()) <= {path[-1]}
        assert gained[r, :n].tolist() == emitted
        assert end == path[-1]


def settled(tree: TreeTensors, tokens: Tensor, target: Tensor) -> Outcome:
    """Of rows that bring all nodes of a tree.

    Args:
        tokens: [R, n] int64, what the nodes hold.
        target: [R, n] int64, what the target draws at them.
    """
    num_rows, num_nodes = tokens.shape
    state = RowState(num_rows, 64, 64, int(tree.column.max()), 3, CPU)
    state.drafts[:num_rows, tree.column] = tokens
    state.chances[:] = 1.0
    trees = OPS.expand(state, torch.arange(num_rows), tree, num_rows * num_nodes)
    assert torch.equal(trees.inflight.tokens, tokens.flatten())
    return OPS.settle(state, KVCache(torch.zeros(1, 2, 1, 64, 1, 1)), trees, target.flatten())


@settings(max_examples=100, deadline=None)
@given(cases())
def test_greedy_takes_the_longest_agreeing_path(case: Case) -> None:
    tree = medusa_tensors(case.tree, 16, CPU)
    tokens, target = torch.tensor(case.tokens), torch.tensor(case.target)
    agreeing = [
        [c == () or t[i] == drawn[case.tree.choices.index(c[:-1])] for i, c in enumerate(case.tree.choices)]
        for t, drawn in zip(case.tokens, case.target, strict=True)
    ]
    outcome = settled(tree, tokens, target)
    width = case.tree.max_depth + 1
    assert outcome.values[:, 1].tolist() == [case.tree.num_nodes] * len(tokens)
    last = outcome.last - torch.arange(len(tokens)) * case.tree.num_nodes
    assert outcome.values[:, 0].tolist() == (tree.depth[last] + 1).tolist()
    emitted, paths = outcome.values[:, 3 : 3 + width], outcome.values[:, 3 + width : 3 + 2 * width]
    check(last, paths, emitted, case, agreeing)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_the_longest_path_has_no_rejected_node(case: Case) -> None:
    tokens, target, accepted = (torch.tensor(rows) for rows in case[1:])
    before = accepted.clone()
    tree = medusa_tensors(case.tree, 16, CPU)
    check(*longest_path(tokens, target, accepted, tree, lossy=True), case, case.accepted)
    assert torch.equal(accepted, before)


def test_of_equally_long_paths_the_more_probable_one_is_taken() -> None:
    tree = medusa_tensors(Tree(((), (0,), (1,), (1, 0), (0, 0))), 2, CPU)
    tokens, target = torch.tensor([[9, 5, 5, 6, 7]]), torch.tensor([[5, 7, 6, 1, 2]])
    last, path, emitted = longest_path(tokens, target, tokens == target[:, tree.parent], tree)
    assert (last.tolist(), path.tolist(), emitted.tolist()) == ([3], [[0, 2, 3]], [[5, 6, 1]])


@pytest.mark.parametrize("rejected", [[], [63], [40], [0]], ids=str)
def test_64_nodes(rejected: list[int]) -> None:
    """The last one's bit is the sign."""
    tree = medusa_tensors(Tree(tuple((0,) * d for d in range(64))), 1, CPU)
    tokens, target = torch.arange(64)[None], torch.arange(100, 164)[None]
    accepted = torch.ones(1, 64, dtype=torch.bool)
    accepted[0, rejected] = False
    last, _, emitted = longest_path(tokens, target, accepted, tree, lossy=True)
    depth = min([node for node in rejected if node], default=64)  # the root counts as accepted
    assert (tree.depth[last] + 1).tolist() == [depth]
    assert emitted[0, :depth].tolist() == [*range(1, depth), 99 + depth]


CHAIN = Tree(((), (0,), (0, 0)))
WIDE = Tree(((), (0,), (1,), (2,), (1, 0), (0, 1), (0, 0), (1, 1)))
MARKOV = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.05, 0.15, 0.8]])  # [last token, next token]


def sample(p: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator)[:, 0].view(p.shape[:-1])


@pytest.mark.parametrize("shared_noise", [False, True], ids=["own noise", "noise shared by depth"])
@pytest.mark.parametrize("tree", [ROOT, CHAIN, WIDE], ids=["root", "chain", "wide"])
@pytest.mark.parametrize("candidates", [[[0, 1, 2], [2, 0, 1]], [[1, 2, 0], [0, 1, 2]]], ids=["poor", "good"])
def test_exact_acceptance_keeps_the_distribution(tree: Tree, candidates: list[list[int]], shared_noise: bool) -> None:
    """Three tokens of a Markov chain after 0, by trees and plain draws: chi-square over all 27 texts."""
    rows, generator = 20_000, torch.Generator().manual_seed(7)
    tensors = medusa_tensors(tree, 3, CPU)
    tokens = torch.cat((torch.tensor([0]), torch.tensor(candidates).flatten()))[tensors.column].expand(rows, -1)
    if shared_noise:
        noise = -torch.empty(rows, tree.max_depth + 1, 3).exponential_(generator=generator).log()
        target = (MARKOV[tokens].log() + noise[:, tensors.depth]).argmax(-1)
    else:
        target = sample(MARKOV[tokens], generator)
    values = settled(tensors, tokens, target).values
    gained, emitted = values[:, 0], values[:, 3 : 4 + tree.max_depth]
    assert tree is ROOT or float(gained.float().mean()) > 1.05  # the tree does something
    text = torch.zeros(rows, 3, dtype=torch.int64)
    width = min(3, emitted.shape[1])
    text[:, :width] = emitted[:, :width]
    for i in range(1, 3):  # what the tree did not bring is drawn plainly
        text[:, i] = torch.where(i < gained, text[:, i], sample(MARKOV[text[:, i - 1]], generator))
    counts = torch.bincount((text * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    expected = torch.einsum("a,ab,bc->abc", MARKOV[0], MARKOV, MARKOV).flatten().double() * rows
    assert chisquare(counts.numpy(), expected.numpy() * rows / float(expected.sum())).pvalue > 1e-3
