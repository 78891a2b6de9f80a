"""Verification: which of a tree's nodes the target model agrees with. Pure functions, batch first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.speculation.tree import TreeTensors


@dataclass(frozen=True, eq=False)
class Verdict:
    """The accepted path of each of R rows that share a tree of depth D."""

    last: Tensor  # [R] int64, the deepest accepted node
    num_accepted: Tensor  # [R] int64, nodes on the path, root included: what is kept of the K/V
    path: Tensor  # [R, D + 1] int64, the nodes of the path by depth, padded with the last one
    emitted: Tensor  # [R, D + 1] int64, the tokens that the row gains: num_accepted of them hold


def agrees(tokens: Tensor, target: Tensor, tree: TreeTensors) -> Tensor:
    """Greedy and exact acceptance: [R, n] bool, whether each node holds what the target drew at its parent.

    Greedy: the target draws its argmax, so the text is that of plain greedy decoding. Exact: the target draws its own
    sample at every node, and a walk goes down while a child holds it, so the text has the model's distribution
    whatever the tree (the first line of the walk *is* plain sampling; the tree only saves forward passes).

    Args:
        tokens: [R, n] int64, the tree's tokens.
        target: [R, n] int64, the token that the target model continues each node with.
    """
    return tokens == target[:, tree.parent]


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


def longest_path(
    tokens: Tensor, target: Tensor, accepted: Tensor, tree: TreeTensors, *, lossy: bool = False
) -> Verdict:
    """The longest path from the root whose every node is accepted; of equals, the earlier (more probable) node's.

    Args:
        tokens: [R, n] int64.
        target: [R, n] int64; the one at the end of the path is the row's next root.
        accepted: [R, n] bool, each node on its own; the root counts as accepted whatever it says.
        lossy: whether a node may be accepted though the target drew something else at its parent.
    """
    if tree.max_depth == 0:  # a root alone: all of the below would say so, at the price of a dozen operations
        nothing = torch.zeros_like(target[:, 0])
        return Verdict(last=nothing, num_accepted=nothing + 1, path=nothing[:, None], emitted=target)
    # a node is reached if all of its ancestors (itself included) were accepted
    held = (accepted.to(torch.int64) << tree.order).sum(dim=1) | 1  # [R], a bit for each node; the root's is set
    reached = (tree.bits & ~held[:, None]) == 0  # [R, n]
    last = torch.where(reached, tree.depth, -1).argmax(dim=1)  # argmax takes the first of equals
    path = tree.path[last]  # [R, D + 1]
    num_accepted = tree.depth[last] + 1
    emitted = target.gather(1, path)
    if lossy:
        below = tokens.gather(1, torch.cat((path[:, 1:], path[:, -1:]), dim=1))  # token at depth d + 1 of the path
        above_end = torch.arange(path.shape[1], device=tokens.device) < (num_accepted - 1)[:, None]
        emitted = torch.where(above_end, below, emitted)
    return Verdict(last=last, num_accepted=num_accepted, path=path, emitted=emitted)
