"""The seam for attention: rows that are trees over a paged K/V cache.

A step's tokens lie flat, row after row. Rows of one shape stand together in a `Group`, so that a backend may treat them
as [rows, nodes]. A token attends to its row's cached prefix and to its ancestors in the row's tree (itself included).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from manyheads.medusa.tree import TreeTensors


@dataclass(frozen=True, eq=False)
class Group:
    """R rows with the same tree of n nodes: tokens `start … start + R·n` of the flat batch, row after row."""

    start: int
    num_rows: int
    tree: TreeTensors
    cached_len: Tensor  # [R] int64, on the device
    block_table: Tensor  # [R, max_blocks] int64, on the device; as wide for every group
    max_cached_len: int  # a bound that the host knows

    @property
    def num_nodes(self) -> int:
        return self.tree.num_nodes

    @property
    def stop(self) -> int:
        return self.start + self.num_rows * self.num_nodes

    @property
    def is_chain(self) -> bool:
        """Whether it is a chunk of a prompt: known tokens, each below the one before."""
        return self.tree.is_chain


class AttentionBackend(Protocol):
    """Owns nothing but scratch: the cache belongs to the runner."""

    def plan(self, groups: list[Group], positions: Tensor, slots: Tensor) -> None:
        """Prepare a step, once for all layers.

        Args:
            groups: all rows of the step.
            positions: [T] int64, for the rotary embedding.
            slots: [T] int64, the cache slot (page · page size + offset) that each in-flight token's K/V goes to.
        """

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        """Norm (if there are weights) and rotate queries and keys, write the in-flight K/V, and attend.

        Args:
            layer: which layer's cache.
            qkv: [T, (heads + 2 · kv_heads) · head_dim].
            q_norm, k_norm: [head_dim], RMS norm weights (Qwen3).

        Returns:
            [T, heads · head_dim]
        """
