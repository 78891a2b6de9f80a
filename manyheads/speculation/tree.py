"""Speculation trees: what a row brings to a step, and how trees grow from measured acceptance.

A node is named by its *choice*: the ranks of the candidates on the way from the root, as in the Medusa paper (Cai et
al. 2024, section 2.1.2 and appendix C). `()` is the root, the last accepted token; `(0, 2)` is the third candidate for
the second token below the best candidate for the first.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from manyheads.batch import TreeTensors

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
        """How many nodes there are, the root included."""
        return len(self.choices)

    @cached_property
    def max_depth(self) -> int:
        """Depth of the deepest node; 0 for a root alone."""
        return max(len(choice) for choice in self.choices)

    @cached_property
    def _hash(self) -> int:
        return hash(self.choices)

    def __hash__(self) -> int:
        return self._hash  # trees are keys at every step

    @property
    def max_rank(self) -> int:
        """Largest candidate rank used, -1 for a root alone."""
        return max((rank for choice in self.choices for rank in choice), default=-1)


ROOT = Tree(((),))


@lru_cache(maxsize=64)
def parents(tree: Tree) -> list[int]:
    """The number of each node's parent; the root is its own."""
    index = {choice: i for i, choice in enumerate(tree.choices)}
    return [index[choice[:-1]] for choice in tree.choices]


def tree_tensors(tree: Tree, columns: list[int], device: torch.device) -> TreeTensors:
    """The tensors of a tree.

    Args:
        columns: for each node, the column of a row's draft that it holds (`Drafter.columns`).
    """
    index = {choice: i for i, choice in enumerate(tree.choices)}
    paths = [[index[choice[:d]] for d in range(len(choice) + 1)] for choice in tree.choices]
    bits = [sum(1 << j for j in path) for path in paths]
    width = tree.max_depth + 1
    tables = (
        parents(tree),
        [len(choice) for choice in tree.choices],
        columns,
        [b - (1 << 64) if b >> 63 else b for b in bits],  # bit 63 is the sign
        [path + [i] * (width - len(path)) for i, path in enumerate(paths)],
    )
    # without waiting for a device, which has steps to do
    return TreeTensors(*(torch.tensor(table).to(device, non_blocking=True) for table in tables))


def grow(
    acceptance: list[list[float]], num_nodes: int, offered: frozenset[Choice] | None = None
) -> tuple[Tree, list[float]]:
    """The `num_nodes` most probable nodes, and each one's probability of being accepted.

    Args:
        acceptance: [depth][rank], the probability that the candidate of this rank is right at this depth (from 1)
            given that its parent was accepted. The probability of a node is the product along its path.
        num_nodes: at most this many, root included; fewer when the table holds no more with a probability above 0.
        offered: the nodes that there are; None for all of the table. A node is there only if its parent is.

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
        if depth == len(order):
            return
        for at in range(place, len(order[depth])):
            choice = (*parent, order[depth][at])
            p = parent_probability * acceptance[depth][choice[-1]]
            if p > 0 and (offered is None or choice in offered):
                heapq.heappush(heap, (-p, choice, at))
                return

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
