"""Tree attention over pages with torch's own kernels: the CPU's backend, and the fallback elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.attention.base import Group, Heads, groups_in
from manyheads.kv_cache import KVCache, Plane

_Kind = tuple[int, int | None]
"""Of a layer: its group (`KVCache.groups`), and its window."""


@dataclass(frozen=True, eq=False)
class _View:
    """What rows see of their caches through a window, or to the beginning: L slots each."""

    pages: Tensor  # [R · L / page size] int64
    span: tuple[int, int] | None  # the slots of a single row whose pages lie side by side
    mask: Tensor | None  # [R, 1, n · query heads per kv head, L], 0 or -inf; None where all is visible


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows with caches of about one length, padded to a rectangle of n tokens by L slots."""

    start: int  # of the step's tokens
    stop: int
    num_rows: int
    num_tokens: int  # n
    place: Tensor | None  # [stop - start] int64, into the R · n; None where every row has n tokens
    views: dict[_Kind, _View]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, its statistics in float32 (Zhang and Sennrich 2019); rounded once."""
    if x.dtype != torch.float32:
        if weight.dtype != x.dtype:
            return rms_norm(x.float(), weight.float(), eps).to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, eps)
    # F.rms_norm on a CPU is a dozen operations, which for few rows costs twice as much
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)


SHORT = 16
"""Tokens of a chain that shares a rectangle with others."""


class TorchAttention:
    """Gathers each row's pages and calls scaled_dot_product_attention on rectangles of rows.

    Query heads that share a K/V head are folded into the query axis, so grouped-query attention copies no K/V.

    Args:
        cache: of all layers.
        heads: of the model.
    """

    def __init__(self, cache: KVCache, heads: Heads) -> None:
        self.cache, self.heads = cache, heads
        self.page_size, self.num_kv_heads, self.head_dim = cache.data.shape[3:]
        self.num_heads, self.queries_per_kv = heads.num_heads, heads.num_heads // self.num_kv_heads
        self._layers = cache.layers()
        self._dtype = next(iter(heads.ropes.values()))[0].dtype
        self._parts: list[_Part] = []
        self._positions = torch.empty(0, dtype=torch.int64, device=cache.device)
        self._ropes = {id(rope): rope for rope in heads.ropes.values()}  # most models have one for all layers
        self._kinds: dict[int, _Kind] = {i: (cache.group_of(i), heads.windows.get(i)) for i in heads.ropes}
        self._slots: dict[int, Tensor] = {}  # by group of layers
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}  # of each, cos and sin of the step's tokens: [T, 1, d]

    def plan(self, groups: list[Group], positions: Tensor, slots: Tensor) -> None:
        self._positions = positions
        self._slots = {layers: self.cache.slots_in(layers, slots) for layers, _ in self._kinds.values()}
        self._turns = {key: (cos[positions], sin[positions]) for key, (cos, sin) in self._ropes.items()}
        self._parts = [part for group in groups for part in self._split(group)]

    def _split(self, group: Group) -> list[_Part]:
        """Rows of about one length, and of all of their tokens, stand together: the rest would be padding.

        Rows of trees come sorted by the length of their caches.
        """
        lengths, starts = group.cached_len.tolist(), group.row_start.tolist()
        if group.is_chain:
            runs = _chains(lengths, [stop - start for start, stop in pairwise(starts)])
            return [self._part(group, r, lengths[r:end], starts[r : end + 1]) for r, end in runs]
        parts: list[_Part] = []
        end = len(lengths)
        while end > 0:
            first = end
            while first > 0 and max(lengths[first - 1], 128) * 2 >= lengths[end - 1]:
                first -= 1
            parts.append(self._part(group, first, lengths[first:end], starts[first : end + 1]))
            end = first
        return parts[::-1]

    def _part(self, group: Group, first_row: int, lengths: list[int], starts: list[int]) -> _Part:
        rows = slice(first_row, first_row + len(lengths))
        counts = [stop - start for start, stop in pairwise(starts)]
        num_rows, tokens = len(counts), max(counts)
        longest = max(length + count for length, count in zip(lengths, counts, strict=True))
        start, stop = group.start + starts[0], group.start + starts[-1]
        bits = group.bits[starts[0] : starts[-1]]
        device = bits.device
        place = None
        if min(counts) < tokens:
            place = torch.tensor(
                [r * tokens + i for r, count in enumerate(counts) for i in range(count)], device=device
            )
            bits = bits.new_ones(num_rows * tokens).index_copy_(0, place, bits)  # padding sees a row's first token
        bits = bits.view(num_rows, tokens)
        order = torch.arange(tokens, device=device)
        # [R, n, n]
        branches = (order[:, None] >= order)[None] if group.is_chain else (bits[..., None] >> order) & 1 != 0
        views: dict[_Kind, _View] = {}
        masks: dict[tuple[int, bool], Tensor] = {}
        for layers, window in self._kinds.values():
            if (layers, window) in views:
                continue
            (of_layers,) = groups_in(self.cache, layers, [group])
            if window is None or window >= longest:  # tokens stand no further apart than slots
                whole = views.get((layers, None)) or self._view(of_layers, rows, min(lengths), longest, branches, masks)
                views[layers, None] = views[layers, window] = whole
            else:
                at = self._positions[start:stop]
                if place is not None:
                    at = at.new_zeros(num_rows * tokens).index_copy_(0, place, at)
                depth = at.view(num_rows, tokens) - group.cached_len[rows, None]
                views[layers, window] = self._view(
                    of_layers, rows, min(lengths), longest, branches, masks, depth, window
                )
        return _Part(start, stop, num_rows, tokens, place, views)

    def _view(
        self,
        group: Group,
        rows: slice,
        shortest: int,
        longest: int,
        branches: Tensor,
        masks: dict[tuple[int, bool], Tensor],
        depth: Tensor | None = None,
        window: int = 0,
    ) -> _View:
        """What rows see.

        Args:
            shortest: of their caches' lengths,
            longest: of these and their tokens.
            branches: [R or 1, n, n] bool, which of a row's tokens a token sees.
            masks: of the same rows elsewhere, by window and by whether slots lie side by side; to be added to.
            depth: [R, n] int64, how far its tokens stand behind its cache; only with a window.
            window: how far back a token sees, itself included; 0: to the beginning.
        """
        num_rows, tokens = rows.stop - rows.start, branches.shape[1]
        low = max(0, shortest + 1 - window) if window else 0  # nobody sees what stands before
        skip, num_pages = low // self.page_size, -(-longest // self.page_size)
        pages = group.page_table[rows, skip:num_pages].reshape(-1)
        device, span = pages.device, None
        if num_rows == 1:
            first = int(pages[0])
            if torch.equal(pages, torch.arange(first, first + num_pages - skip, device=device)):
                # nothing is padded: the prefix is visible, and behind it stand the tokens
                begin = (first - skip) * self.page_size
                span = (begin + low, begin + longest)
                if tokens == 1:
                    return _View(pages, span, None)
                if not window:
                    return _View(pages, span, F.pad(self._mask(~branches), (longest - tokens, 0)))
        if (mask := masks.get((window, span is None))) is not None:
            return _View(pages, span, mask)
        # position of each slot relative to the first in-flight token: [R, 1, L]
        slots = torch.arange(skip * self.page_size, num_pages * self.page_size, device=device)
        if span is not None:
            slots = torch.arange(low, longest, device=device)
        relative = (slots - group.cached_len[rows, None])[:, None]
        at = relative.clamp(0, tokens - 1)
        if tokens == 1:
            hidden = relative > 0
        else:
            seen = branches.expand(num_rows, -1, -1).gather(2, at.expand(-1, tokens, -1)) & (relative < tokens)
            hidden = ~(seen | (relative < 0))
        if depth is not None:
            at_depth = torch.where(relative < 0, relative, depth[:, None].gather(2, at))
            hidden = hidden | (depth[..., None] - at_depth >= window)
        mask = masks[window, span is None] = self._mask(hidden)
        return _View(pages, span, mask)

    def _mask(self, hidden: Tensor) -> Tensor:
        """[R, n, L] bool to what is added to scores, for all query heads of a K/V head."""
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device)
        return mask.masked_fill_(hidden, float("-inf")).repeat_interleave(self.queries_per_kv, dim=1)[:, None]

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        num_rotated = self.num_heads + self.num_kv_heads
        qkv = qkv.view(-1, num_rotated + self.num_kv_heads, self.head_dim)
        # A mask multiplies by 0, which makes NaN of NaN: no token may put one where others look. A token that has some
        # is found by what its own residual makes of it. A quarter of the most leaves room for the rotation.
        most = torch.finfo(qkv.dtype).max / 4
        qkv[:, self.num_heads :].nan_to_num_(0.0, most, -most)
        qk = qkv[:, :num_rotated]
        if q_norm is not None and k_norm is not None:
            q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
            q, k = (rms_norm(x, w, self.heads.eps) for x, w in ((q, q_norm), (k, k_norm)))
            qk = torch.cat((q, k), dim=1)
        # sin is signed: x · cos + rotate_half(x) · sin, without the negation
        cos, sin = self._turns[id(self.heads.ropes[layer])]
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, dims=-1), sin)
        keys, values = self._layers[layer]
        slots = self._slots[self._kinds[layer][0]]
        keys.write(slots, qk[:, self.num_heads :])
        values.write(slots, qkv[:, num_rotated:])
        outputs = [self._attend(layer, part, qk) for part in self._parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(self, layer: int, part: _Part, qk: Tensor) -> Tensor:
        rows, tokens, kv_heads, dim = part.num_rows, part.num_tokens, self.num_kv_heads, self.head_dim
        view = part.views[self._kinds[layer]]

        def read(plane: Plane) -> Tensor:
            found = plane.pages(view.pages, qk.dtype) if view.span is None else plane.span(*view.span, qk.dtype)
            return found.view(rows, -1, kv_heads, dim).transpose(1, 2)

        keys, values = (read(plane) for plane in self._layers[layer])
        queries = qk[part.start : part.stop, : self.num_heads]
        if part.place is not None:
            padded = queries.new_zeros(rows * tokens, self.num_heads, dim)
            queries = padded.index_copy_(0, part.place, queries)
        queries = queries.reshape(rows, tokens, kv_heads, self.queries_per_kv, dim).transpose(1, 2)
        queries = queries.reshape(rows, kv_heads, tokens * self.queries_per_kv, dim)
        sinks = self.heads.sinks.get(layer)
        if self.heads.softcap is None and sinks is None:
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=view.mask, scale=self.heads.scale)
        else:
            out = self._attend_by_scores(queries, keys, values, view.mask, sinks)
        out = out.view(rows, kv_heads, tokens, self.queries_per_kv, dim).transpose(1, 2)
        out = out.reshape(rows * tokens, self.num_heads * dim)
        return out if part.place is None else out.index_select(0, part.place)

    def _attend_by_scores(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        """scaled_dot_product_attention with scores that are capped before the mask, or weighed beside sinks."""
        scale, softcap = self.head_dim**-0.5 if self.heads.scale is None else self.heads.scale, self.heads.softcap
        scores = queries @ keys.transpose(-1, -2)
        scores = scores.mul_(scale) if softcap is None else scores.mul_(scale / softcap).tanh_().mul_(softcap)
        if mask is not None:
            scores += mask
        if sinks is None:
            return scores.softmax(-1, dtype=torch.float32).to(queries.dtype) @ values
        rows, kv_heads, count, _ = queries.shape  # query heads of a K/V head stand side by side, token by token
        beside = sinks.view(1, kv_heads, 1, -1).expand(rows, -1, count // self.queries_per_kv, -1)
        scores = torch.cat((scores, beside.reshape(rows, kv_heads, count, 1).to(scores.dtype)), -1)
        return scores.softmax(-1, dtype=torch.float32)[..., :-1].to(queries.dtype) @ values


def _chains(lengths: list[int], counts: list[int]) -> list[tuple[int, int]]:
    """From which row to which, exclusive, chains share a rectangle: those of prompts are long, and each of another
    length, so that they have one each; short ones of about one length stand together. Rows without tokens have none.

    Args:
        lengths: of the rows' caches.
        counts: of tokens that they bring.
    """
    runs: list[tuple[int, int]] = []
    for row, count in enumerate(counts):
        if count == 0:
            continue
        first = runs[-1][0] if runs and runs[-1][1] == row and count <= SHORT >= counts[row - 1] else row
        shortest, longest = min(lengths[first : row + 1]), max(lengths[first : row + 1])
        if first < row and max(shortest, 128) * 2 >= longest:
            runs[-1] = (first, row + 1)
        else:
            runs.append((row, row + 1))
    return runs
