"""Tree attention over pages for NVIDIA GPUs: the kernels of `kernels/` behind the seam of base.py."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from manyheads.attention.base import Group
from manyheads.kernels.attention import choose_splits, tile_sizes, tree_attention
from manyheads.kernels.fused import rope_store
from manyheads.kv_cache import KVCache


@dataclass(frozen=True, eq=False)
class _Call:
    """Rows that one launch of the kernel serves: a group of trees, or all chains."""

    tokens: slice
    row_start: Tensor  # [R + 1] int32, from the call's first token on
    cached_len: Tensor  # [R] int64
    page_table: Tensor  # [R, max_pages] int64
    mask: Tensor  # [tokens] int64
    max_nodes: int
    num_splits: int


class TritonAttention:
    """Two kernels a layer: one rotates and writes the cache, one attends (and, for few rows, one combines its parts).

    Args: as `TorchAttention`'s.
    """

    def __init__(self, cache: KVCache, num_heads: int, eps: float, rope: tuple[Tensor, Tensor]) -> None:
        self.cache, self.rope, self.device = cache, rope, cache.device
        self.num_heads, self.num_kv_heads, self.eps = num_heads, cache.data.shape[4], eps
        self._layers = cache.layers()
        on_gpu = self.device.type == "cuda"  # else Triton's interpreter
        self._num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 1
        self._calls: list[_Call] = []
        self._positions = self._slots = torch.empty(0, dtype=torch.int64, device=self.device)

    def plan(self, groups: list[Group], positions: Tensor, slots: Tensor) -> None:
        self._positions, self._slots = positions, slots
        # the chunks of all prompts are one launch; they stand together
        runs = [list(run) for _, run in groupby(groups, lambda group: None if group.is_chain else id(group))]
        self._calls = [self._call(run) for run in runs]

    def _call(self, groups: list[Group]) -> _Call:
        first, last = groups[0], groups[-1]
        tokens, rows = last.stop - first.start, sum(g.num_rows for g in groups)
        max_nodes, per_kv = max(g.max_tokens for g in groups), self.num_heads // self.num_kv_heads
        block_m, _ = tile_sizes(max_nodes, -(-tokens // rows), per_kv)
        tiles = max(rows, -(-tokens * per_kv // block_m))  # about as many hold queries
        longest = max(g.max_cached_len + g.max_tokens for g in groups)
        quantized = self._layers[0][0].scale is not None
        splits = choose_splits(tiles * self.num_kv_heads, block_m, longest, self._num_sms, quantized)
        if len(groups) == 1:
            parts = (first.row_start, first.cached_len, first.page_table, first.bits)
        else:
            starts = torch.tensor([*(g.start - first.start for g in groups), last.stop - first.start])
            parts = (
                starts.to(torch.int32).to(self.device, non_blocking=True),
                torch.cat([g.cached_len for g in groups]),
                torch.cat([g.page_table for g in groups]),
                torch.cat([g.bits for g in groups]),
            )
        return _Call(slice(first.start, last.stop), *parts, max_nodes, splits)

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        keys, values = self._layers[layer]
        cos, sin = self.rope
        q = rope_store(
            qkv,
            cos,
            sin,
            self._positions,
            self._slots,
            keys.data,
            values.data,
            self.num_heads,
            q_norm,
            k_norm,
            self.eps,
            keys.scale,
            values.scale,
        )
        out = torch.empty_like(q)
        for call in self._calls:
            tree_attention(
                q[call.tokens],
                keys.data,
                values.data,
                call.row_start,
                call.cached_len,
                call.page_table,
                call.mask,
                max_nodes=call.max_nodes,
                num_splits=call.num_splits,
                k_scale=keys.scale,
                v_scale=values.scale,
                out=out[call.tokens],
            )
        return out.flatten(1)
