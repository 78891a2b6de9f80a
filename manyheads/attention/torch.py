"""Tree attention over pages with torch's own kernels: the CPU's backend, and the fallback elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.attention.base import Group
from manyheads.models.config import ModelConfig
from manyheads.models.ops import rms_norm


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows of one group with caches of about one length, padded to a rectangle of L slots."""

    start: int
    num_rows: int
    num_nodes: int
    pages: Tensor  # [R · L / page size] int64
    span: tuple[int, int] | None  # the slots of a single row whose pages lie side by side
    mask: Tensor | None  # [R, 1, n · query heads per kv head, L], 0 or -inf; None where all is visible


class TorchAttention:
    """Gathers each row's pages and calls scaled_dot_product_attention on rectangles of rows.

    Query heads that share a K/V head are folded into the query axis, so grouped-query attention copies no K/V.

    Args:
        cache: [layers, 2, pages, page size, kv_heads, head_dim], keys at 0 and values at 1.
        config: of the model.
        rope: cos and signed sin, [positions, 1, head_dim].
    """

    def __init__(self, cache: Tensor, config: ModelConfig, rope: tuple[Tensor, Tensor]) -> None:
        self.cache, self.rope = cache, rope
        self.block_size, self.num_kv_heads, self.head_dim = cache.shape[3:]
        self.num_heads, self.eps = config.num_heads, config.rms_norm_eps
        self.queries_per_kv = config.num_heads // config.num_kv_heads
        # each layer's keys and values, as pages and as slots: views, made once
        self._pages = [layer.unbind(0) for layer in cache]
        self._flat = [layer.flatten(1, 2).unbind(0) for layer in cache]
        self._parts: list[_Part] = []
        self._slots = cache.new_empty(0, dtype=torch.int64)
        self._cos, self._sin = rope

    def plan(self, groups: list[Group], positions: Tensor, slots: Tensor) -> None:
        self._slots = slots
        self._cos, self._sin = self.rope[0][positions], self.rope[1][positions]  # [T, 1, d]
        self._parts = [self._part(group) for group in groups]

    def _part(self, group: Group) -> _Part:
        num_nodes = group.num_nodes
        num_pages = -(-(group.max_cached_len + num_nodes) // self.block_size)
        length = num_pages * self.block_size
        pages = group.block_table[:, :num_pages].reshape(-1)
        span = None
        if group.num_rows == 1:
            first = int(pages[0])
            if torch.equal(pages, torch.arange(first, first + num_pages, device=pages.device)):
                length = int(group.cached_len) + num_nodes
                span = (first * self.block_size, first * self.block_size + length)
        if span:
            # nothing is padded: the prefix is visible, and behind it stand the nodes
            mask = None
            if num_nodes > 1:
                hidden = (~group.tree.ancestors).repeat_interleave(self.queries_per_kv, dim=0)
                branches = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=pages.device).masked_fill_(
                    hidden, float("-inf")
                )
                mask = F.pad(branches, (length - num_nodes, 0))[None, None]
            return _Part(group.start, 1, num_nodes, pages, span, mask)
        # position of each slot relative to the first in-flight token: [R, L]
        relative = torch.arange(length, device=pages.device) - group.cached_len[:, None]
        if num_nodes == 1:
            hidden = (relative > 0)[:, None]  # [R, 1, L]
        else:
            seen = group.tree.ancestors.T[relative.clamp(0, num_nodes - 1)]  # [R, L, n]
            seen = torch.where((relative < num_nodes)[..., None], seen, False)
            hidden = ~torch.where((relative < 0)[..., None], True, seen).transpose(1, 2)  # [R, n, L]
        mask = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=pages.device)
        mask = mask.masked_fill_(hidden, float("-inf"))
        mask = mask.repeat_interleave(self.queries_per_kv, dim=1)[:, None]
        return _Part(group.start, group.num_rows, num_nodes, pages, span, mask)

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        num_rotated = self.num_heads + self.num_kv_heads
        qkv = qkv.view(-1, num_rotated + self.num_kv_heads, self.head_dim)
        qk = qkv[:, :num_rotated]
        if q_norm is not None and k_norm is not None:
            q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
            q, k = (rms_norm(x, w, self.eps) for x, w in ((q, q_norm), (k, k_norm)))
            qk = torch.cat((q, k), dim=1)
        # sin is signed: x · cos + rotate_half(x) · sin, without the negation
        qk = torch.addcmul(qk * self._cos, qk.roll(self.head_dim // 2, dims=-1), self._sin)
        keys, values = self._flat[layer]
        keys.index_copy_(0, self._slots, qk[:, self.num_heads :])
        values.index_copy_(0, self._slots, qkv[:, num_rotated:])
        outputs = [self._attend(layer, part, qk) for part in self._parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(self, layer: int, part: _Part, qk: Tensor) -> Tensor:
        rows, nodes, kv_heads, dim = part.num_rows, part.num_nodes, self.num_kv_heads, self.head_dim
        if part.span is None:
            keys, values = (pages.index_select(0, part.pages) for pages in self._pages[layer])
        else:
            low, high = part.span
            keys, values = (slots[low:high] for slots in self._flat[layer])
        keys, values = (x.view(rows, -1, kv_heads, dim).transpose(1, 2) for x in (keys, values))
        queries = qk[part.start : part.start + rows * nodes, : self.num_heads]
        queries = queries.reshape(rows, nodes, kv_heads, self.queries_per_kv, dim).transpose(1, 2)
        queries = queries.reshape(rows, kv_heads, nodes * self.queries_per_kv, dim)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=part.mask)
        out = out.view(rows, kv_heads, nodes, self.queries_per_kv, dim).transpose(1, 2)
        return out.reshape(rows * nodes, self.num_heads * dim)
