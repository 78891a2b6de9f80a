"""Attention on a CPU in float32, compiled from C (`native/layers.c`): of rows that are trees, over their pages."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.base import Group, Heads, groups_in
from manyheads.attention.torch import TorchAttention
from manyheads.kv_cache import KVCache
from manyheads.native.layers import LANES, Layers, Shape, Trees


def serves(cache: KVCache, heads: Heads) -> bool:
    """Whether there is such attention over a cache."""
    in_float = cache.data.dtype == torch.float32 and cache.device.type == "cpu"
    is_plain = heads.softcap is None and not heads.sinks
    return in_float and is_plain and cache.data.shape[-1] % LANES == 0


class NativeAttention(TorchAttention):
    """`TorchAttention` that leaves to torch the chains of prompts alone; for trees no pages are copied and no masks are
    made. What comes of a tree's token does not depend on what else is there.

    Args:
        layers: the functions.
    """

    def __init__(self, cache: KVCache, heads: Heads, layers: Layers) -> None:
        super().__init__(cache, heads)
        scale = self.head_dim**-0.5 if heads.scale is None else heads.scale
        sizes = heads.num_heads, self.num_kv_heads, self.head_dim, self.page_size
        self._c, self._shape = layers, Shape(*sizes, heads.eps, scale)
        self._planes = [(keys.data, values.data) for keys, values in self._layers]
        self._trees: dict[int, list[tuple[int, Trees]]] = {}  # by group of layers; and where the tokens of each begin
        self._kept: list[Tensor] = []  # what is pointed to

    def plan(self, groups: list[Group], positions: Tensor, slots: Tensor) -> None:
        super().plan([group for group in groups if group.is_chain], positions, slots.contiguous())
        self._kept = []
        trees = [group for group in groups if not group.is_chain]
        self._trees = {
            layers: [(group.start, self._told(group)) for group in groups_in(self.cache, layers, trees)]
            for layers in self._slots
        }

    def _told(self, group: Group) -> Trees:
        positions = self._positions[group.start : group.stop]
        tensors = (group.row_start, group.bits, positions, group.cached_len, group.page_table)
        kept = [tensor.contiguous() for tensor in tensors]
        self._kept += kept
        pointers = (tensor.data_ptr() for tensor in kept)
        return Trees(*pointers, group.num_rows, group.page_table.shape[1], group.max_cached_len)

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        qkv, cache, rope = qkv.contiguous(), self._planes[layer], self._turns[id(self.heads.ropes[layer])]
        layers, window = self._kinds[layer]
        self._c.turn(self._shape, qkv, rope, (q_norm, k_norm), cache, self._slots[layers])
        out = qkv.new_empty(len(qkv), self.num_heads * self.head_dim)
        for part in self._parts:
            out[part.start : part.stop] = self._attend(layer, part, qkv.view(len(qkv), -1, self.head_dim))
        for start, trees in self._trees[layers]:
            self._c.attend(self._shape, trees, qkv[start:], cache, out[start:], window or 0)
        return out
