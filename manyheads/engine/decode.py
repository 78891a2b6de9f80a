"""A decoding row's part of a step, on the device: from its draft to the tokens of its tree, from the verdict to its
next state. On a GPU nothing here waits, and shapes depend on what the host knows: a CUDA graph can hold all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.engine.state import RowState
from manyheads.medusa.tree import TreeTensors
from manyheads.medusa.verify import Verdict
from manyheads.models.ops import has_kernels


@dataclass(frozen=True, eq=False)
class InFlight:
    """R rows that bring the same tree of n nodes (or chain of n known tokens)."""

    index: Tensor  # [R] int64, slots of the row state
    tree: TreeTensors
    tokens: Tensor  # [R, n] int64
    position: Tensor  # [R, n] int64, of the tokens themselves
    slots: Tensor  # [R, n] int64, cache slots

    @property
    def num_rows(self) -> int:
        return self.index.shape[0]

    @property
    def num_nodes(self) -> int:
        return self.tree.num_nodes


def expand(state: RowState, index: Tensor, tree: TreeTensors) -> InFlight:
    """The trees of decoding rows: the last token, and below it the heads' candidates."""
    return place(state, index, tree, state.drafts[index[:, None], tree.column])


def place(state: RowState, index: Tensor, tree: TreeTensors, tokens: Tensor) -> InFlight:
    """Where tokens [R, n] stand in the sequence and in the cache."""
    cached = state.cached_len[index, None]  # [R, 1]
    slot = cached + tree.order
    page = state.block_table[index[:, None], slot // state.block_size]
    slots = page * state.block_size + slot % state.block_size
    return InFlight(index, tree, tokens, cached + tree.depth, slots)


def advance(state: RowState, cache: Tensor, rows: InFlight, verdict: Verdict) -> Tensor:
    """Keep what was accepted: its K/V go to the end of the row's prefix, the row moves on.

    Args:
        cache: [layers, 2, pages, page size, kv_heads, head_dim].

    Returns:
        [R, 1 + 2 · (D + 1) + H · K] int64 for the host: tokens gained, which, the nodes that drew them, and the
        candidates that were known when the step began.
    """
    index = rows.index
    if rows.num_nodes > 1:
        _compact(cache, rows, verdict)
    last = verdict.num_accepted[:, None]
    report = torch.cat((last, verdict.emitted, verdict.path, state.candidates[index]), dim=1)
    state.cached_len.index_add_(0, index, verdict.num_accepted)
    state.drafts[index, 0] = verdict.emitted.gather(1, last - 1)[:, 0]
    return report


def _compact(cache: Tensor, rows: InFlight, verdict: Verdict) -> None:
    """Move the K/V of an accepted path's nodes to the first slots of the row's in-flight tokens."""
    if has_kernels(cache.device):
        from manyheads.kernels.compact import compact

        compact(cache, rows.slots, verdict.path, verdict.num_accepted)
        return
    depth = torch.arange(verdict.path.shape[1], device=cache.device)
    moved = (verdict.path != depth) & (depth < verdict.num_accepted[:, None])
    if bool(moved.any()):
        source = rows.slots.gather(1, verdict.path)[moved]
        destination = rows.slots[:, : depth.numel()][moved]
        flat = cache.flatten(2, 3)
        flat[:, :, destination] = flat[:, :, source]
