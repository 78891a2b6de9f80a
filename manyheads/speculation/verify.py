"""The rules by which a tree's nodes are accepted.

| rule | a node is accepted if | promise |
|---|---|---|
| greedy | it holds the target's argmax at its parent | the text is that of plain greedy decoding |
| exact | it holds the target's own sample at its parent | the text has the model's distribution, whatever the tree |
| typical | `p > min(ε, α · exp(−H))` at its parent | none: Medusa's own lossy rule |

The first two are one: the target draws a token at every node, and the walk goes down while a child holds what was drawn
(the first line of the walk *is* plain decoding; the tree only saves forward passes). The walk itself, and what follows
from it for a row, is an operation of the device: `Ops.settle`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.batch import RowState, Trees, TreeTensors


def accepted_nodes(state: RowState, trees: Trees, target: Tensor, distributions: dict[int, Tensor]) -> Tensor | None:
    """[R, n] bool, which nodes each row accepts, each node on its own; None where no row has a lossy rule.

    Args:
        target: [T] int64, the token that the target model drew after each token of the step.
        distributions: by row, for rows with typical acceptance: [n, V] float32, the target's distribution after each
            node, at the row's temperature.
    """
    if not distributions:
        return None
    tree = trees.tree
    accepted = trees.node_tokens == target[trees.place][:, tree.parent]
    for i, distribution in distributions.items():
        row, index = slice(i, i + 1), trees.inflight.index[i : i + 1]
        accepted[row] = typical(
            trees.node_tokens[row], distribution[None], tree, state.epsilon[index], state.alpha[index]
        )
    return accepted


def typical(tokens: Tensor, probabilities: Tensor, tree: TreeTensors, epsilon: Tensor, alpha: Tensor) -> Tensor:
    """Medusa's typical acceptance: [R, n] bool (Cai et al. 2024, section 2.3.1).

    Args:
        tokens: [R, n] int64.
        probabilities: [R, n, V] float32, the target's distribution after each node, at the row's temperature.
        epsilon, alpha: [R] float32.
    """
    entropy = -torch.xlogy(probabilities, probabilities).sum(-1)  # [R, n]
    p = probabilities[:, tree.parent].gather(-1, tokens[..., None])[..., 0]  # [R, n], of each node after its parent
    # a node is accepted if  p > min(ε, α · exp(−H))  after its parent
    threshold = torch.minimum(epsilon[:, None], alpha[:, None] * torch.exp(-entropy[:, tree.parent]))
    return p > threshold
