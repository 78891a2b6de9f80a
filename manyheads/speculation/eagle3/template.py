"""The nodes for which an EAGLE-3 drafter has candidates, and what its passes need to know of them.

The tree of a step is a part of them. Which of them are looked at in which row is decided on the device; the template
only says which there are at all.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from manyheads.batch import MAX_NODES, Level
from manyheads.speculation.costs import LEAST_RATE
from manyheads.speculation.tree import Choice, grow

LEAST_CHILDREN = 2
"""What is opened has so many children at least: that they differ says that it was."""


class Template:
    """A tree of C nodes beside the root, parents before their children; node c holds candidate c of a row.

    Args:
        prior: [depth][rank] acceptance to expect; its nodes are the most probable ones.
        num_nodes: most nodes, the root included.
    """

    def __init__(self, prior: list[list[float]], num_nodes: int = MAX_NODES) -> None:
        # from the best rank on, so that a node's children are the best candidates
        falling = [sorted((max(p, LEAST_RATE) for p in ranks), reverse=True) for ranks in prior]
        grown = grow(falling, num_nodes)[0].choices[1:]
        sizes = Counter(choice[:-1] for choice in grown)
        kept = [c for c in grown if all(sizes[c[:depth]] >= LEAST_CHILDREN for depth in range(len(c)))]
        self._best_first = kept
        self.choices: tuple[Choice, ...] = tuple(sorted(kept, key=lambda choice: (len(choice), choice)))
        self.index = {choice: c for c, choice in enumerate(self.choices)}
        self.max_depth = max(len(choice) for choice in self.choices)
        self.children = {
            parent: [self.index[choice] for choice in self.choices if choice[:-1] == parent]
            for parent in {choice[:-1] for choice in self.choices}
        }
        """Candidates by rank, of every node that has some."""
        self.widths = lru_cache(maxsize=64)(self._widths)  # few numbers of nodes are asked for, each at many steps

    @property
    def num_candidates(self) -> int:
        """C."""
        return len(self.choices)

    @property
    def num_inner(self) -> int:
        """Nodes that have children, the root left out: so many a row may open."""
        return len(self.children) - 1

    @property
    def nodes_within(self) -> tuple[int, ...]:
        """By depth: nodes that are no deeper, the root included."""
        return tuple(1 + sum(len(c) <= depth for c in self.choices) for depth in range(1, self.max_depth + 1))

    def _widths(self, nodes: float) -> list[float]:
        """By depth, the root left out: how many nodes have children in the tree of so many nodes that is best by the
        prior. Between two numbers of nodes, it is in proportion."""
        whole, part = divmod(nodes, 1)
        fewer, more = (
            Counter(map(len, {choice[:-1] for choice in self._best_first[: int(whole) + i]})) for i in (-1, 0)
        )
        return [fewer[depth] + part * (more[depth] - fewer[depth]) for depth in range(1, self.max_depth)]

    def level(self, depth: int, device: torch.device) -> Level:
        """The nodes at a depth that have children; at 0 the root."""
        parents = [choice for choice in sorted(self.children) if len(choice) == depth]
        families = [[1 + c for c in self.children[parent]] for parent in parents]
        width, pad = max(map(len, families)), 1 + self.num_candidates

        def tensor(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return Level(
            depth=depth,
            columns=tensor([self._column(choice) for choice in parents]),
            parents=tensor([self._column(choice[:-1]) for choice in parents]),
            families=tensor([family + [pad] * (width - len(family)) for family in families]),
        )

    def _column(self, choice: Choice) -> int:
        return 1 + self.index[choice] if choice else 0
