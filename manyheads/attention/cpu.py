"""Tree attention over pages with torch's own kernels: the CPU's backend, and the reference for the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.attention.base import Group


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows of one group with caches of about one length, padded to a rectangle of L slots."""

    start: int
    num_rows: int
    num_nodes: int
    pages: Tensor  # [R · L / page size] int64
    mask: Tensor  # [R, 1, n · query heads per kv head, L], 0 or -inf


class CpuAttention:
    """Gathers each row's pages and calls scaled_dot_product_attention on rectangles of rows.

    Query heads that share a K/V head are folded into the query axis, so grouped-query attention copies no K/V.

    Args:
        cache: [layers, 2, pages, page size, kv_heads, head_dim], keys at 0 and values at 1.
        num_heads: query heads.
    """

    def __init__(self, cache: Tensor, num_heads: int) -> None:
        self.cache = cache
        self.block_size, self.num_kv_heads, self.head_dim = cache.shape[3:]
        self.queries_per_kv = num_heads // self.num_kv_heads
        # each layer's keys and values, as pages and as slots: views, made once
        self._pages = [layer.unbind(0) for layer in cache]
        self._flat = [layer.flatten(1, 2).unbind(0) for layer in cache]
        self._parts: list[_Part] = []
        self._slots = cache.new_empty(0, dtype=torch.int64)

    def plan(self, groups: list[Group], slots: Tensor) -> None:
        self._slots = slots
        self._parts = [self._part(group) for group in groups]

    def _part(self, group: Group) -> _Part:
        num_nodes = group.num_nodes
        num_pages = -(-(group.max_cached_len + num_nodes) // self.block_size)
        length = num_pages * self.block_size
        # position of each slot relative to the first in-flight token: [R, L]
        relative = torch.arange(length, device=group.cached_len.device) - group.cached_len[:, None]
        inflight = (relative >= 0) & (relative < num_nodes)
        ancestor = group.ancestors.T[relative.clamp(0, num_nodes - 1)]  # [R, L, n]
        visible = (relative < 0)[..., None] | (inflight[..., None] & ancestor)
        mask = torch.zeros(visible.shape, dtype=self.cache.dtype, device=visible.device)
        mask = mask.masked_fill_(~visible, float("-inf")).transpose(1, 2)  # [R, n, L]
        mask = mask.repeat_interleave(self.queries_per_kv, dim=1)[:, None]
        pages = group.block_table[:, :num_pages].reshape(-1)
        return _Part(group.start, group.num_rows, num_nodes, pages, mask)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._flat[layer]
        keys.index_copy_(0, self._slots, k)
        values.index_copy_(0, self._slots, v)
        outputs = [self._attend(layer, part, q) for part in self._parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(self, layer: int, part: _Part, q: Tensor) -> Tensor:
        rows, nodes, kv_heads, dim = part.num_rows, part.num_nodes, self.num_kv_heads, self.head_dim
        key_pages, value_pages = self._pages[layer]
        keys = key_pages.index_select(0, part.pages).view(rows, -1, kv_heads, dim).transpose(1, 2)
        values = value_pages.index_select(0, part.pages).view(rows, -1, kv_heads, dim).transpose(1, 2)
        queries = q[part.start : part.start + rows * nodes].view(rows, nodes, kv_heads, self.queries_per_kv, dim)
        queries = queries.transpose(1, 2).reshape(rows, kv_heads, nodes * self.queries_per_kv, dim)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=part.mask)
        out = out.view(rows, kv_heads, nodes, self.queries_per_kv, dim).transpose(1, 2)
        return out.reshape(rows * nodes, kv_heads * self.queries_per_kv, dim)
