from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.batch import RowState
from manyheads.ops.torch import TorchOps
from manyheads.speculation.tree import Tree, grow
from manyheads.speculation.verify import accepted_nodes, typical
from tests.trees import medusa_tensors

CPU = torch.device("cpu")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 0.5), st.floats(0.05, 1.0))
def test_typical_acceptance_is_the_papers_rule(seed: int, epsilon: float, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    tree = grow([[0.5, 0.2, 0.1], [0.5, 0.3]], 8)[0]
    tokens = torch.randint(0, 4, (2, 8), generator=generator)
    p = torch.softmax(3 * torch.randn(2, 8, 4, generator=generator), -1)
    p[0, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # entropy 0
    epsilons, alphas = torch.tensor([epsilon, 0.09]), torch.tensor([alpha, 0.3])
    accepted = typical(tokens, p, medusa_tensors(tree, 3, CPU), epsilons, alphas)
    for r in range(2):
        for i, choice in enumerate(tree.choices[1:], 1):
            after = p[r, tree.choices.index(choice[:-1])].tolist()
            entropy = -sum(q * math.log(q) for q in after if q > 0)
            threshold = min(float(epsilons[r]), float(alphas[r]) * math.exp(-entropy))
            if abs(after[int(tokens[r, i])] - threshold) > 1e-5:
                assert bool(accepted[r, i]) == (after[int(tokens[r, i])] > threshold)


TREE = Tree(((), (0,), (1,), (0, 0), (1, 0)))


@pytest.mark.parametrize("lossy", [[], [1], [0, 2]], ids=str)
def test_each_row_has_its_own_rule(lossy: list[int]) -> None:
    """Rows in any order of slots; those without a lossy rule accept what the target drew, whatever the others do."""
    generator = torch.Generator().manual_seed(len(lossy))
    tree = medusa_tensors(TREE, 2, CPU)
    state = RowState(5, 20, 4, 4, 3, CPU)
    state.drafts[:] = torch.randint(0, 3, state.drafts.shape, generator=generator)
    state.chances[:, 1:] = 0.5
    state.epsilon[:], state.alpha[:] = torch.linspace(0.05, 0.5, 6), torch.linspace(0.6, 0.1, 6)
    index = torch.tensor([4, 0, 3])
    trees = TorchOps().expand(state, index, tree, 15)
    target = torch.randint(0, 3, (15,), generator=generator)
    distributions = {r: torch.softmax(2 * torch.randn(5, 3, generator=generator), -1) for r in lossy}
    accepted = accepted_nodes(state, trees, target, distributions)
    if not lossy:
        assert accepted is None
        return
    assert accepted is not None
    for r, slot in enumerate(index.tolist()):
        tokens = trees.node_tokens[r]
        if r in lossy:
            epsilon, alpha = state.epsilon[slot : slot + 1], state.alpha[slot : slot + 1]
            wanted = typical(tokens[None], distributions[r][None], tree, epsilon, alpha)[0]
        else:
            wanted = tokens == target[5 * r : 5 * r + 5][tree.parent]
        assert accepted[r, 1:].tolist() == wanted[1:].tolist()
