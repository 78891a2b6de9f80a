"""What rows' trees held, for requests that ask for their steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from manyheads.request import Guess
from manyheads.speculation.tree import Tree, parents


@dataclass(frozen=True, eq=False)
class TreeGuesses:
    """Which nodes the rows of a step brought. All else is on the host in any case: candidates, and accepted paths."""

    taken: Tensor  # [R, n] bool, `Trees.taken`, on its way to the host
    tree: Tree
    columns: list[int]
    """`Drafter.columns` of the tree."""

    def of(self, row: int, candidates: list[int], path: Iterable[int]) -> list[Guess]:
        """Those of a row.

        Args:
            candidates: the row's, as the step began.
            path: the nodes that were accepted.
        """
        parent, accepted = parents(self.tree), frozenset(path)
        place = {0: -1}
        guesses: list[Guess] = []
        for node, is_taken in enumerate(self.taken[row].tolist()):
            if node and is_taken:
                place[node] = len(guesses)
                guesses.append(Guess(candidates[self.columns[node] - 1], place[parent[node]], node in accepted))
        return guesses
