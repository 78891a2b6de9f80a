"""Tree attention over pages for NVIDIA GPUs: the kernels of `kernels/` behind the seam of base.py."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.base import Group
from manyheads.kernels.attention import choose_splits, tile_sizes, tree_attention
from manyheads.kernels.fused import rope_store
from manyheads.kv_cache import KVCache


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
        self._calls: list[tuple[Group, int]] = []
        self._positions = self._slots = torch.empty(0, dtype=torch.int64, device=self.device)

    def plan(self, groups: list[Group], positions: Tensor, slots: Tensor) -> None:
        self._positions, self._slots = positions, slots
        self._calls = [(group, self._num_splits(group)) for group in groups]

    def _num_splits(self, group: Group) -> int:
        """Programs that share a row's prefix."""
        tokens, per_kv = group.stop - group.start, self.num_heads // self.num_kv_heads
        block_m, _ = tile_sizes(group.max_tokens, -(-tokens // group.num_rows), per_kv)
        tiles = max(group.num_rows, -(-tokens * per_kv // block_m))  # about as many hold queries
        longest = group.max_cached_len + group.max_tokens
        quantized = self._layers[0][0].scale is not None
        return choose_splits(tiles * self.num_kv_heads, block_m, longest, self._num_sms, quantized)

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
        for group, num_splits in self._calls:
            tokens = slice(group.start, group.stop)
            tree_attention(
                q[tokens],
                keys.data,
                values.data,
                group.row_start,
                group.cached_len,
                group.page_table,
                group.bits,
                max_nodes=group.max_tokens,
                num_splits=num_splits,
                k_scale=keys.scale,
                v_scale=values.scale,
                out=out[tokens],
            )
        return out.flatten(1)
