"""What the decoding rows of a step bring."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from manyheads.speculation.costs import Kind
from manyheads.speculation.tree import ROOT, Tree

SIZES = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Nodes a row, on average over a step's rows, that are considered."""
DEEPER = 1
"""Where depth costs passes, trees are at most so much deeper than a row has nodes on average: it is the sure rows'
chains that are longer."""


@dataclass(frozen=True)
class Draft:
    """What the decoding rows of a step bring: of the nodes that `tree` has for each of them, the most probable ones, so
    many that a row has `nodes` on average."""

    tree: Tree
    nodes: float
    passes: int = 0
    """That the drafter runs for trees of this depth, if it runs some for each."""
    scratch: int = 0
    """Tokens behind a row's text of which the drafter keeps K/V while it guesses."""

    @property
    def propose(self) -> bool:
        """Whether the drafter runs, for the next step's trees."""
        return self.nodes > 1

    @cached_property
    def kind(self) -> Kind:
        """What its steps cost is told by this."""
        return Kind(self.nodes, self.passes)

    @property
    def num_slots(self) -> int:
        """Cache slots behind its text that a row needs: for its tree, and then for guesses behind what it gained."""
        return max(self.tree.num_nodes, self.most_gained + self.scratch) if self.propose else 1

    @property
    def most_gained(self) -> int:
        """Tokens that a row can gain."""
        return self.tree.max_depth + 1

    def num_tokens(self, rows: int) -> int:
        """In-flight tokens of so many rows."""
        return min(int(self.nodes * rows), self.tree.num_nodes * rows)


NO_DRAFT = Draft(ROOT, 1)


def deepest(nodes: float) -> int:
    """How deep trees of so many nodes a row on average are at most, where depth costs passes."""
    return ceil(nodes) + DEEPER
