"""The seam for attention: rows that are trees over a paged K/V cache.

A step's tokens lie flat, row after row; a row brings as many as it likes. A token attends to its row's cached prefix
and to its ancestors in the row's tree (itself included).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from manyheads.kv_cache import KVCache

Rotation = tuple[Tensor, Tensor]
"""cos and signed sin of every position, [positions, 1, head_dim] each; the first half of sin is negated."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Heads:
    """What attention has to know of a model beside its cache."""

    num_heads: int
    """Of queries."""
    eps: float
    """Of the norms of queries and keys, where there are such."""
    ropes: Mapping[int, Rotation]
    """By layer of the cache, how queries and keys are turned."""
    windows: Mapping[int, int] = field(default_factory=dict)
    """By layer of the cache, how many tokens back it looks, itself included; the others look to the beginning."""
    scale: float | None = None
    """What products of queries and keys are multiplied with; None is head_dim ** -0.5."""
    softcap: float | None = None
    """Scores s become softcap · tanh(s / softcap) (Gemma 2)."""
    sinks: Mapping[int, Tensor] = field(default_factory=dict)
    """By layer of the cache, of every query head a score that takes its share of the weights, and gives no value
    (gpt-oss): [num_heads] float32."""


@dataclass(frozen=True, eq=False)
class Group:
    """R rows that are trees, or R rows that are chains: tokens `start … stop - 1` of the flat batch."""

    start: int
    stop: int
    row_start: Tensor  # [R + 1] int32, row r's tokens are row_start[r] … row_start[r + 1] - 1 of the group's
    bits: Tensor  # [stop - start] int64, bit j: the row's token j is this one or above it; 0 is a chain
    cached_len: Tensor  # [R] int64, on the device
    page_table: Tensor  # [R, max_pages] int64, on the device; as wide for every group
    max_tokens: int  # bounds that the host knows: tokens of a row,
    max_cached_len: int  # and its cached ones
    is_chain: bool = False

    @property
    def num_rows(self) -> int:
        """How many rows stand in it."""
        return self.cached_len.shape[0]


def groups_in(cache: KVCache, layers: int, groups: list[Group]) -> list[Group]:
    """The same rows over the pages that a group of layers has (`KVCache.groups`)."""
    if layers == 0:
        return groups
    return [replace(group, page_table=cache.pages_in(layers, group.page_table)) for group in groups]


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
