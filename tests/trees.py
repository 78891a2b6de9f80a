"""Trees as a step has them, for tests that need no drafter to be loaded."""

from __future__ import annotations

from typing import Any

import torch

from manyheads.batch import TreeTensors
from manyheads.speculation.drafter import DrafterShape
from manyheads.speculation.medusa.drafter import MedusaDrafter
from manyheads.speculation.tree import Tree, tree_tensors


def medusa(num_heads: int, num_ranks: int, accuracy: list[list[float]] | None = None) -> MedusaDrafter:
    """A drafter of so many heads with so many candidates each. It knows which is which, and cannot propose any."""
    heads: Any = None
    return MedusaDrafter(heads, DrafterShape(max_depth=num_heads, num_candidates=num_heads * num_ranks), accuracy)


def medusa_tensors(tree: Tree, num_ranks: int, device: torch.device) -> TreeTensors:
    """The tensors of a tree over the candidates of heads with so many ranks each."""
    return tree_tensors(tree, medusa(max(tree.max_depth, 1), num_ranks).columns(tree), device)
