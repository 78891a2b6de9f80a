from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from manyheads.speculation.tree import ROOT, Tree, grow, tree_tensors
from manyheads.speculation.verify import Verdict, agrees, longest_path, typical

CPU = torch.device("cpu")


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


def check(verdict: Verdict, case: Case, accepted: list[list[bool]]) -> None:
    for r, n in enumerate(verdict.num_accepted.tolist()):
        path, emitted = naive(case.tree, case.tokens[r], case.target[r], accepted[r])
        assert verdict.path[r, :n].tolist() == path
        assert set(verdict.path[r, n:].tolist()) <= {path[-1]}
        assert verdict.emitted[r, :n].tolist() == emitted
        assert int(verdict.last[r]) == path[-1]


@settings(max_examples=100, deadline=None)
@given(cases())
def test_greedy_takes_the_longest_agreeing_path(case: Case) -> None:
    tree = tree_tensors(case.tree, 16, CPU)
    tokens, target = torch.tensor(case.tokens), torch.tensor(case.target)
    agreeing = [
        [c == () or t[i] == drawn[case.tree.choices.index(c[:-1])] for i, c in enumerate(case.tree.choices)]
        for t, drawn in zip(case.tokens, case.target, strict=True)
    ]
    accepted = agrees(tokens, target, tree)
    assert accepted[:, 1:].tolist() == [row[1:] for row in agreeing]
    check(longest_path(tokens, target, accepted, tree), case, agreeing)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_the_longest_path_has_no_rejected_node(case: Case) -> None:
    tokens, target, accepted = (torch.tensor(rows) for rows in case[1:])
    before = accepted.clone()
    tree = tree_tensors(case.tree, 16, CPU)
    check(longest_path(tokens, target, accepted, tree, lossy=True), case, case.accepted)
    assert torch.equal(accepted, before)


def test_of_equally_long_paths_the_more_probable_one_is_taken() -> None:
    tree = tree_tensors(Tree(((), (0,), (1,), (1, 0), (0, 0))), 2, CPU)
    tokens, target = torch.tensor([[9, 5, 5, 6, 7]]), torch.tensor([[5, 7, 6, 1, 2]])
    verdict = longest_path(tokens, target, agrees(tokens, target, tree), tree)
    assert (verdict.path.tolist(), verdict.emitted.tolist()) == ([[0, 2, 3]], [[5, 6, 1]])


@pytest.mark.parametrize("rejected", [[], [63], [40], [0]], ids=str)
def test_64_nodes(rejected: list[int]) -> None:
    """The last one's bit is the sign."""
    tree = Tree(tuple((0,) * d for d in range(64)))
    tokens, target = torch.arange(64)[None], torch.arange(100, 164)[None]
    accepted = torch.ones(1, 64, dtype=torch.bool)
    accepted[0, rejected] = False
    verdict = longest_path(tokens, target, accepted, tree_tensors(tree, 1, CPU), lossy=True)
    depth = min([node for node in rejected if node], default=64)  # the root counts as accepted
    assert verdict.num_accepted.tolist() == [depth]
    assert verdict.emitted[0, :depth].tolist() == [*range(1, depth), 99 + depth]


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
    tensors = tree_tensors(tree, 3, CPU)
    tokens = torch.cat((torch.tensor([0]), torch.tensor(candidates).flatten()))[tensors.column].expand(rows, -1)
    if shared_noise:
        noise = -torch.empty(rows, tree.max_depth + 1, 3).exponential_(generator=generator).log()
        target = (MARKOV[tokens].log() + noise[:, tensors.depth]).argmax(-1)
    else:
        target = sample(MARKOV[tokens], generator)
    verdict = longest_path(tokens, target, agrees(tokens, target, tensors), tensors)
    assert tree is ROOT or float(verdict.num_accepted.float().mean()) > 1.05  # the tree does something
    text = torch.zeros(rows, 3, dtype=torch.int64)
    width = min(3, verdict.emitted.shape[1])
    text[:, :width] = verdict.emitted[:, :width]
    for i in range(1, 3):  # what the tree did not bring is drawn plainly
        text[:, i] = torch.where(i < verdict.num_accepted, text[:, i], sample(MARKOV[text[:, i - 1]], generator))
    counts = torch.bincount((text * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    expected = torch.einsum("a,ab,bc->abc", MARKOV[0], MARKOV, MARKOV).flatten().double() * rows
    assert chisquare(counts.numpy(), expected.numpy() * rows / float(expected.sum())).pvalue > 1e-3


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 0.5), st.floats(0.05, 1.0))
def test_typical_acceptance_is_the_papers_rule(seed: int, epsilon: float, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    tree = grow([[0.5, 0.2, 0.1], [0.5, 0.3]], 8)[0]
    tokens = torch.randint(0, 4, (2, 8), generator=generator)
    p = torch.softmax(3 * torch.randn(2, 8, 4, generator=generator), -1)
    p[0, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # entropy 0
    epsilons, alphas = torch.tensor([epsilon, 0.09]), torch.tensor([alpha, 0.3])
    accepted = typical(tokens, p, tree_tensors(tree, 3, CPU), epsilons, alphas)
    for r in range(2):
        for i, choice in enumerate(tree.choices[1:], 1):
            after = p[r, tree.choices.index(choice[:-1])].tolist()
            entropy = -sum(q * math.log(q) for q in after if q > 0)
            threshold = min(float(epsilons[r]), float(alphas[r]) * math.exp(-entropy))
            if abs(after[int(tokens[r, i])] - threshold) > 1e-5:
                assert bool(accepted[r, i]) == (after[int(tokens[r, i])] > threshold)
