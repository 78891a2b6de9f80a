"""Speculation trees: what a row brings to a step, and how trees grow from measured acceptance.

A node is named by its *choice*: the ranks of the candidates on the way from the root, as in the Medusa paper (Cai et
al. 2024, section 2.1.2 and appendix C). `()` is the root, the last accepted token; `(0, 2)` is the third candidate of
the second head below the best candidate of the first.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

MAX_NODES = 64

Choice = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A frozen tree of n nodes, root first, every parent before its children.

    So a node's index is never smaller than its depth, and moving an accepted path to the front never overwrites
    a node that is still to be moved.
    """

    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        if not self.choices or self.choices[0] != ():
            raise ValueError("a tree starts with its root, the empty choice ()")
        seen: set[Choice] = set()
        for choice in self.choices:
            if choice in seen:
                raise ValueError(f"choice {choice} stands twice in the tree")
            if choice and choice[:-1] not in seen:
                raise ValueError(f"choice {choice} comes before its parent {choice[:-1]}")
            seen.add(choice)

    @property
    def num_nodes(self) -> int:
        return len(self.choices)

    @property
    def max_depth(self) -> int:
        return max(len(choice) for choice in self.choices)

    @property
    def max_rank(self) -> int:
        """Largest candidate rank used, -1 for a root alone."""
        return max((rank for choice in self.choices for rank in choice), default=-1)


ROOT = Tree(((),))


@dataclass(frozen=True, eq=False)
class TreeTensors:
    """A tree as tensors on a device; n nodes, depths 0…D."""

    parent: Tensor  # [n] int64, the root is its own parent
    depth: Tensor  # [n] int64
    column: Tensor  # [n] int64, index into a row's draft: its last token, then its [heads · ranks] candidates
    bits: Tensor  # [n] int64, bit j of entry i: j is i or above it
    path: Tensor  # [n, D + 1] int64, the nodes from the root down to node i by depth, padded with i itself

    @property
    def num_nodes(self) -> int:
        return self.depth.shape[0]

    @property
    def max_depth(self) -> int:
        return self.path.shape[1] - 1

    @cached_property
    def order(self) -> Tensor:
        """[n] int64: 0, 1, 2, …"""
        return torch.arange(self.num_nodes, device=self.depth.device)

    @cached_property
    def ancestors(self) -> Tensor:
        """[n, n] bool, entry (i, j): j is i or above it."""
        return (self.bits[:, None] >> self.order) & 1 != 0


@lru_cache(maxsize=512)
def tree_tensors(tree: Tree, num_ranks: int, device: torch.device) -> TreeTensors:
    """The tensors of `tree` where a row holds `num_ranks` candidates of each head."""
    index = {choice: i for i, choice in enumerate(tree.choices)}
    paths = [[index[choice[:d]] for d in range(len(choice) + 1)] for choice in tree.choices]
    bits = [sum(1 << j for j in path) for path in paths]
    width = tree.max_depth + 1
    column = [0, *(1 + (len(choice) - 1) * num_ranks + choice[-1] for choice in tree.choices[1:])]
    tables = (
        [index[choice[:-1]] for choice in tree.choices],
        [len(choice) for choice in tree.choices],
        column,
        [b - (1 << 64) if b >> 63 else b for b in bits],  # bit 63 is the sign
        [path + [i] * (width - len(path)) for i, path in enumerate(paths)],
    )
    # without waiting for a device, which has steps to do
    return TreeTensors(*(torch.tensor(table).to(device, non_blocking=True) for table in tables))


def grow(acceptance: list[list[float]], num_nodes: int) -> tuple[Tree, list[float]]:
    """The `num_nodes` most probable nodes, and each one's probability of being accepted.

    Args:
        acceptance: [depth][rank], the probability that the candidate of this rank is right at this depth (from 1)
            given that its parent was accepted. The probability of a node is the product along its path.
        num_nodes: at most this many, root included; fewer when the table holds no more with a probability above 0.

    The trees for 1, 2, 3, … nodes are prefixes of one another (Cai et al. 2024, appendix C, grow their tree the
    same way).
    """
    choices: list[Choice] = [()]
    probabilities = [1.0]
    # what is measured need not fall with the rank
    order = [sorted(range(len(ranks)), key=lambda r, ranks=ranks: -ranks[r]) for ranks in acceptance]  # type: ignore[misc]
    heap: list[tuple[float, Choice, int]] = []

    def push(parent: Choice, parent_probability: float, place: int) -> None:
        """The child that stands at this place of the order at its depth."""
        depth = len(parent)
        if depth < len(order) and place < len(order[depth]):
            rank = order[depth][place]
            p = parent_probability * acceptance[depth][rank]
            if p > 0:
                heapq.heappush(heap, (-p, (*parent, rank), place))

    probability: dict[Choice, float] = {(): 1.0}
    push((), 1.0, 0)
    while heap and len(choices) < num_nodes:
        negative, choice, place = heapq.heappop(heap)
        choices.append(choice)
        probabilities.append(-negative)
        probability[choice] = -negative
        push(choice, -negative, 0)
        push(choice[:-1], probability[choice[:-1]], place + 1)
    return Tree(tuple(choices)), probabilities
