"""Tree attention over pages for NVIDIA GPUs: the kernels of `kernels/` behind the seam of base.py."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.base import Group, Heads, groups_in
from manyheads.config import ConfigError
from manyheads.kernels.attention import choose_splits, largest_tile, tile_size, tile_table, tree_attention, variants
from manyheads.kernels.fused import rope_store
from manyheads.kv_cache import KVCache


class TritonAttention:
    """Two kernels a layer: one rotates and writes the cache, one attends (and, for few rows, one combines its parts).

    Args: as `TorchAttention`'s.
    """

    def __init__(self, cache: KVCache, heads: Heads) -> None:
        self.cache, self.heads, self.device = cache, heads, cache.device
        self.num_heads, self.num_kv_heads = heads.num_heads, cache.data.shape[4]
        head_dim = cache.data.shape[5]
        if head_dim < 16 or head_dim & (head_dim - 1):
            raise ConfigError(f"head_dim {head_dim} is not supported on a GPU, only powers of two from 16 on")
        self._layers = cache.layers()
        on_gpu = self.device.type == "cuda"  # else Triton's interpreter
        self._num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 1
        # by layer its group, and its window; 0 is none
        self._kinds = {layer: (cache.group_of(layer), heads.windows.get(layer, 0)) for layer in heads.ropes}
        self._calls: dict[tuple[int, int], list[tuple[Group, Tensor, int]]] = {}  # by these: rows, tiles, splits
        self._slots: dict[int, Tensor] = {}  # by group of layers
        self._positions = torch.empty(0, dtype=torch.int64, device=self.device)
        self._dtype = next(iter(heads.ropes.values()))[0].dtype
        self._quantized = self._layers[0][0].scale is not None
        self._largest_tile = largest_tile(self.device, head_dim, self._dtype.itemsize, self._quantized)
        if on_gpu:
            self._compile()

    def plan(self, groups: list[Group], positions: Tensor, slots: Tensor) -> None:
        self._positions = positions
        kinds = sorted(set(self._kinds.values()))
        self._slots = {layers: self.cache.slots_in(layers, slots) for layers, _ in kinds}
        found = {layers: groups_in(self.cache, layers, groups) for layers in self._slots}
        self._calls = {kind: [] for kind in kinds}
        per_kv = self.num_heads // self.num_kv_heads
        for i, group in enumerate(groups):
            tokens = group.stop - group.start
            block_m = tile_size(group.max_tokens, -(-tokens // group.num_rows), per_kv, self._largest_tile)
            tiles = tile_table(group.row_start, tokens, group.max_tokens, per_kv, block_m)
            for (layers, window), calls in self._calls.items():
                calls.append((found[layers][i], tiles, self._num_splits(group, block_m, window)))

    def _num_splits(self, group: Group, block_m: int, window: int) -> int:
        """Programs that share a row's prefix, or what is seen of it through a window."""
        tokens, per_kv = group.stop - group.start, self.num_heads // self.num_kv_heads
        tiles = max(group.num_rows, -(-tokens * per_kv // block_m))  # about as many hold queries
        longest = group.max_cached_len + group.max_tokens
        if window:
            longest = min(longest, window + group.max_tokens)
        return choose_splits(tiles * self.num_kv_heads, block_m, longest, self._num_sms, self._quantized)

    def __call__(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        keys, values = self._layers[layer]
        cos, sin = self.heads.ropes[layer]
        q = rope_store(
            qkv,
            cos,
            sin,
            self._positions,
            self._slots[self._kinds[layer][0]],
            keys.data,
            values.data,
            self.num_heads,
            q_norm,
            k_norm,
            self.heads.eps,
            keys.scale,
            values.scale,
        )
        out = torch.empty_like(q)
        for group, tiles, num_splits in self._calls[self._kinds[layer]]:
            tokens = slice(group.start, group.stop)
            self._attend(layer, q[tokens], group, num_splits, self._positions[tokens], tiles, out[tokens])
        return out.flatten(1)

    def _attend(
        self,
        layer: int,
        q: Tensor,
        group: Group,
        num_splits: int,
        positions: Tensor,
        tiles: Tensor | None = None,
        out: Tensor | None = None,
    ) -> None:
        keys, values = self._layers[layer]
        tree_attention(
            q,
            keys.data,
            values.data,
            group.row_start,
            group.cached_len,
            group.page_table,
            group.bits,
            max_nodes=group.max_tokens,
            num_splits=num_splits,
            scale=self.heads.scale,
            softcap=self.heads.softcap,
            sinks=self.heads.sinks.get(layer),
            window=self._kinds[layer][1],
            positions=positions,
            k_scale=keys.scale,
            v_scale=values.scale,
            tiles=tiles,
            out=out,
        )

    def _compile(self) -> None:
        """Run the kernels in every variant that a step can need, on the dummy page: to compile one takes seconds."""
        kinds = {(window, layer in self.heads.sinks): layer for layer, (_, window) in self._kinds.items()}
        for layer in kinds.values():
            head_dim = self._layers[layer][0].data.shape[-1]
            for num_tokens, num_splits in variants(self.num_heads // self.num_kv_heads):
                numbers = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
                starts = torch.tensor([0, num_tokens], dtype=torch.int32).to(self.device)
                group = Group(0, num_tokens, starts, numbers, numbers[:1], numbers[None], num_tokens, 0)
                q = torch.zeros(num_tokens, self.num_heads, head_dim, dtype=self._dtype, device=self.device)
                self._attend(layer, q, group, num_splits, numbers)
