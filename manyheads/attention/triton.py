"""Tree attention over pages for NVIDIA GPUs: the kernels of `kernels/` behind the seam of base.py."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.base import Group
from manyheads.kernels.attention import choose_splits, tile_sizes, tree_attention
from manyheads.kernels.fused import rope_store
from manyheads.models.config import ModelConfig


class TritonAttention:
    """Two kernels a layer: one rotates and writes the cache, one attends (and, for few rows, one combines its parts).

    Args: as `TorchAttention`'s.
    """

    def __init__(self, cache: Tensor, config: ModelConfig, rope: tuple[Tensor, Tensor]) -> None:
        self.cache, self.rope = cache, rope
        self.num_heads, self.num_kv_heads, self.eps = config.num_heads, config.num_kv_heads, config.rms_norm_eps
        self._layers = [layer.unbind(0) for layer in cache]  # keys and values, [pages, page size, kv_heads, head_dim]
        self._num_sms = torch.cuda.get_device_properties(cache.device).multi_processor_count
        self._groups: list[tuple[Group, Tensor, Tensor, int]] = []
        self._positions = self._slots = cache.new_empty(0, dtype=torch.int64)

    def plan(self, groups: list[Group], positions: Tensor, slots: Tensor) -> None:
        self._positions, self._slots = positions, slots
        self._groups = []
        for group in groups:
            nodes = group.num_nodes
            row_start = torch.arange(
                0, (group.num_rows + 1) * nodes, nodes, dtype=torch.int32, device=self.cache.device
            )
            mask = group.tree.bits.repeat(group.num_rows)
            _, tiles = tile_sizes(nodes, self.num_heads // self.num_kv_heads)
            splits = choose_splits(
                group.num_rows, self.num_kv_heads, tiles, group.max_cached_len + nodes, self._num_sms
            )
            self._groups.append((group, row_start, mask, splits))

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        keys, values = self._layers[layer]
        cos, sin = self.rope
        q = rope_store(
            qkv, cos, sin, self._positions, self._slots, keys, values, self.num_heads, q_norm, k_norm, self.eps
        )
        out = torch.empty_like(q)
        for group, row_start, mask, splits in self._groups:
            part = slice(group.start, group.start + group.num_rows * group.num_nodes)
            tree_attention(
                q[part],
                keys,
                values,
                row_start,
                group.cached_len,
                group.block_table,
                mask,
                max_nodes=group.num_nodes,
                num_splits=splits,
                out=out[part],
            )
        return out.flatten(1)
