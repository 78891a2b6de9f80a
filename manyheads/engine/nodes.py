"""The nodes at which a step's rows draw, as the sampler sees them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from manyheads.batch import TreeTensors
from manyheads.engine.masks import Masks
from manyheads.engine.step import Request


@dataclass(frozen=True, eq=False)
class Nodes:
    """R rows that draw at T nodes, as the sampler sees them. There may be more (dummy) rows than requests."""

    requests: list[Request]
    rows: Tensor  # [R] int64, slots of the row state
    row: Tensor  # [T] int64, which of the R a node belongs to
    node: Tensor  # [T] int64, of the tree
    depth: Tensor  # [T] int64, in its row's tree
    max_depth: int
    first: Tensor  # [R] int64, position in the sequence of the token that a root draws
    node_tokens: Tensor  # [R, n] int64, what the nodes of the whole tree would hold
    place: Tensor  # [R, n] int64, where they stand among the T; nodes that a row did not bring stand at its root
    tree: TreeTensors
    masks: Masks | None = None
    """What grammars allow; None where no row has one."""
