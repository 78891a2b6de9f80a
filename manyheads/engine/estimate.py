"""What an engine will take, from its shape alone: arithmetic, before gigabytes are loaded.

Each part is what is alive at the dearest moment, in bytes. Beside the weights it is

    scratch    activations of the largest step, then its logits and what the sampler makes of them
    graphs     logits of every captured step, activations once (they share a pool), CUDA's own
    state      rows, page tables, penalties' counts, rotary embeddings

and the K/V cache gets what is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from manyheads.config import ConfigError
from manyheads.engine import prompt_graphs
from manyheads.engine.graphs import ROWS, TREE_ROWS, padded_rows
from manyheads.engine.memory import Limit
from manyheads.engine.runner import NUM_RANKS
from manyheads.kv_cache import KVCache
from manyheads.models.config import ModelConfig
from manyheads.models.llama import POSITION_MARGIN
from manyheads.models.loader import parameter_shapes
from manyheads.models.ops import has_kernels
from manyheads.sizes import format_size
from manyheads.speculation.medusa.checkpoint import HeadWeights
from manyheads.speculation.planner import MAX_INFLIGHT, SIZES
from manyheads.speculation.tree import MAX_NODES

LIBRARY_BYTES = 96 * 2**20
"""On a GPU: cuBLAS's workspaces on two streams (32 MiB each), and scratch of attention that splits long prefixes."""
GRAPH_BYTES = 2 * 2**20
"""What CUDA takes for a captured step, some five hundred kernels, beside its tensors."""

QUANTIZED_BYTES: dict[str, tuple[float, float | None]] = {
    "int8": (1.0, 1.0),
    "fp8": (1.0, 1.0),
    "int4": (0.56, 1.0),
    "bitsandbytes-8bit": (1.0, None),
    "bitsandbytes-4bit": (0.57, None),
}
"""Bytes of a number by scheme, scales included: in layers, and in projections to the vocabulary (None: as without)."""
RECOMMENDED = ("int8", "int4")


@dataclass(frozen=True)
class Parts:
    """What an engine takes beside its K/V cache, in bytes."""

    weights: int
    heads: int
    state: int
    scratch: int
    graphs: int

    @property
    def total(self) -> int:
        return self.weights + self.heads + self.state + self.scratch + self.graphs


@dataclass(frozen=True)
class HeadsShape:
    """Shape of Medusa heads."""

    num_heads: int
    block_weights: int
    """Numbers in the residual blocks of all heads."""
    projection_weights: int
    """Numbers in the projections that are not the base model's."""
    num_tokens: int
    """Tokens that a head can propose."""

    @classmethod
    def of(cls, weights: HeadWeights, vocab_size: int) -> HeadsShape:
        own = {id(p): p.numel() for p in weights.projections or []}
        blocks = sum(w.numel() + b.numel() for head in weights.blocks for w, b in head)
        tokens = vocab_size if weights.token_map is None else weights.token_map.numel()
        return cls(len(weights.blocks), blocks, sum(own.values()), tokens)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What an engine's size follows from."""

    model: ModelConfig
    heads: HeadsShape | None
    dtype: torch.dtype
    """Of activations."""
    device: torch.device
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    tree_size: int | None = None
    quantization: str | None = None
    kv_dtype: torch.dtype | None = None
    """Of K/V, one of `kv_cache.CODES`; None is that of activations."""

    @property
    def num_drawn(self) -> int:
        """Most tokens of decoding rows in a step, at each of which one is drawn."""
        rows = self.max_num_seqs
        if self.heads is None:
            return rows
        if self.tree_size is not None:
            return self.tree_size * rows
        return min(MAX_NODES * rows, max(MAX_INFLIGHT, 2 * rows))

    @property
    def page_bytes(self) -> int:
        """A page of the K/V cache, all layers."""
        return self._page_bytes(self.kv_dtype or self.dtype)

    def _page_bytes(self, dtype: torch.dtype) -> int:
        return KVCache.zeros(self.model.kv_shape, 1, self.block_size, dtype, torch.device("meta")).nbytes

    @property
    def page_cost(self) -> int:
        """What a page takes in the end. Without the kernels, attention gathers one layer's pages of the rows in a step,
        padded to twice their length at most, and widens codes."""
        if has_kernels(self.device):
            return self.page_bytes
        gathered = self.page_bytes + (self._page_bytes(self.dtype) if self.kv_dtype is not None else 0)
        return self.page_bytes + 2 * gathered // self.model.num_layers

    def parts(self) -> Parts:
        """Everything beside the K/V cache."""
        heads = 0.0
        if self.heads is not None:
            layer, vocabulary = matrix_bytes(self.dtype, self.device, self.model.dtype, self.quantization)
            heads = self.heads.block_weights * layer + self.heads.projection_weights * vocabulary
        weights = weights_bytes(self.model, self.dtype, self.device, self.quantization)
        return Parts(weights, int(heads), self._state(), self._scratch(), self._graphs())

    def _state(self) -> int:
        """`RowState`, with the penalties' counts, and the table of rotary embeddings."""
        model, rows = self.model, self.max_num_seqs + 1
        candidates = 1 + (self.heads.num_heads * NUM_RANKS if self.heads else 0)
        pages = -(-(self.max_model_len + MAX_NODES) // self.block_size)
        row = 8 * (4 + candidates + pages) + 4 * (9 + candidates) + 5 * model.vocab_size
        rope = 2 * (model.max_position_embeddings + POSITION_MARGIN) * model.head_dim * self.dtype.itemsize
        return rows * row + rope

    def _scratch(self) -> int:
        tokens = self.max_num_batched_tokens + self.num_drawn
        scratch = self._activations(tokens) + max(self._draw(), 4 * self._logits() + self._propose())
        if has_kernels(self.device):
            return scratch + LIBRARY_BYTES
        # masks: of every query head of a K/V head, before they are repeated, and as the bits they are made of
        queries = self.model.num_heads // self.model.num_kv_heads
        return scratch + tokens * self.max_model_len * ((queries + 1) * self.dtype.itemsize + 3)

    def _activations(self, tokens: int) -> int:
        """A layer's: residual, norm and a product in two float32 parts; q, k, v rotated, attended; gate, up, both."""
        model = self.model
        q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        width = 2 * model.hidden_size + 5 * q + 4 * kv + 3 * model.intermediate_size
        return tokens * (width * self.dtype.itemsize + 8 * model.hidden_size)

    def _logits(self) -> int:
        """Numbers in the logits of the largest step."""
        return self.num_drawn * self.model.vocab_size

    def _draw(self) -> int:
        """The eager sampler's.

        Logits as computed and in float32, over the temperature, sorted with their order (int64), softmax, cumulated,
        masks: 36 bytes for each beside the logits as computed; 16 more kept for log-probabilities, of up to four times
        as many nodes as drew. Or, when that is done, the noise: hashes in int64 (36 bytes each, at most four at once)
        for every row and depth. And one row's penalties.
        """
        logits, vocab = self._logits(), self.model.vocab_size
        depths = 1 + (self.heads.num_heads if self.heads else 0)
        noise = 36 * self.max_num_seqs * depths * vocab
        penalties = 32 * (MAX_NODES if self.heads else 1) * vocab
        return max((36 + self.dtype.itemsize) * logits, 16 * logits + noise) + 16 * logits + penalties

    def _propose(self) -> int:
        """The heads': logits as computed, joined, in float32, exponentiated; top-k with indices."""
        if self.heads is None:
            return 0
        return self.max_num_seqs * self.heads.num_heads * self.heads.num_tokens * (2 * self.dtype.itemsize + 16)

    def _graphs(self) -> int:
        """Captured at start-up for all sizes of trees, else for the one that is used and for roots."""
        if not has_kernels(self.device):
            return 0
        most = self.max_num_seqs
        sizes: Sequence[float] = SIZES[1:]
        if self.heads is None or self.tree_size is not None:
            sizes = [self.tree_size] if self.heads and self.tree_size and self.tree_size > 1 else []
        tokens = list({padded_rows(count, most, ROWS) for count in range(1, most + 1)})
        for rows in {padded_rows(count, most, TREE_ROWS) for count in range(1, most + 1)}:
            most_inflight = max(MAX_INFLIGHT, 2 * rows) if self.tree_size is None else self.num_drawn
            tokens += [int(size * rows) for size in sizes if int(size * rows) <= most_inflight]
        logits = sum(tokens) * self.model.vocab_size * self.dtype.itemsize
        largest = max(*tokens, prompt_graphs.TOKENS[-1])
        count = len(tokens) + len(prompt_graphs.TOKENS) * len(prompt_graphs.ROWS)
        return count * GRAPH_BYTES + logits + self._activations(largest) + self._propose()

    def blocks_within(self, limit: Limit, parts: Parts) -> int:
        """Pages of K/V that there is room for; not positive where there is none."""
        return (limit.total - limit.base - parts.total) // self.page_cost

    def require(self, limit: Limit, parts: Parts, num_blocks: int, asked_by: str | None = None) -> None:
        """See that a K/V cache of so many pages fits.

        Args:
            asked_by: the setting that asks for so many.

        Raises:
            ConfigError: it does not; with the size of every part, and what to change.
        """
        if self.blocks_within(limit, parts) >= num_blocks:
            return
        cache = num_blocks * self.page_cost
        need = limit.base + parts.total + cache
        named = [(f.name, getattr(parts, f.name)) for f in fields(parts)]
        named += [("the process itself", limit.base), ("K/V cache" if asked_by else "one page of K/V", cache)]
        sizes = ", ".join(f"{name} {format_size(size)}" for name, size in named if size)
        changes = [f"{what} saves {format_size(saved)}" for what, saved in self._savings() if saved > need // 200]
        if asked_by is not None:
            changes.insert(0, f"a smaller {asked_by}")
        raise ConfigError(
            f"{limit.name} is too little: {format_size(need)} are needed ({sizes}). Give more memory, or change: "
            + "; ".join(changes or ["the model, for a smaller one"])
        )

    def _savings(self) -> list[tuple[str, int]]:
        """Settings that take less, and how many bytes less."""
        smaller = {}
        for name, least in (("max_num_seqs", 8), ("max_num_batched_tokens", 256), ("max_model_len", 2048)):
            if (now := getattr(self, name)) > least:
                change: dict[str, Any] = {name: least}
                smaller[f"{name}={least} instead of {now}"] = replace(self, **change)
        if self.heads is not None:
            smaller["speculative=False"] = replace(self, heads=None)
        if self.dtype == torch.float32 and self.device.type == "cuda":
            smaller["dtype=float16"] = replace(self, dtype=torch.float16)
        if self.quantization is None:
            for scheme in RECOMMENDED:
                smaller[f"quantization={scheme}"] = replace(self, quantization=scheme)
        total = self.parts().total
        return [(what, total - shape.parts().total) for what, shape in smaller.items()]


def weights_bytes(model: ModelConfig, dtype: torch.dtype, device: torch.device, quantization: str | None = None) -> int:
    """Bytes of the base model's weights; see `matrix_bytes` for what is not known before they are loaded."""
    layer, vocabulary = matrix_bytes(dtype, device, model.dtype, quantization)
    total = 0.0
    for name, shape in parameter_shapes(model).items():
        if name == "lm_head.weight":
            total += math.prod(shape) * vocabulary
        elif len(shape) == 2 and name != "embed_tokens.weight":
            total += math.prod(shape) * layer
        else:
            total += math.prod(shape) * dtype.itemsize
    if model.tie_word_embeddings and (_is_packed(dtype, device) or vocabulary != dtype.itemsize):
        total += model.vocab_size * model.hidden_size * vocabulary  # not the embedding itself
    return int(total)


def matrix_bytes(
    dtype: torch.dtype, device: torch.device, checkpoint: torch.dtype, quantization: str | None = None
) -> tuple[float, float]:
    """Bytes of a number in a weight that is multiplied with: a layer's, and a projection's to the vocabulary.

    In float32 on a CPU, weights that are float16 numbers are kept as such (`models.linear.Linear`). A checkpoint in
    float32 may hold such weights: what it takes at least is what counts here.
    """
    plain = dtype.itemsize
    if _is_packed(dtype, device) and checkpoint in (torch.float16, torch.float32):
        plain = 2 if "fbgemm" in torch.backends.quantized.supported_engines else 4
    if quantization is None:
        return plain, plain
    layer, vocabulary = QUANTIZED_BYTES[quantization]
    return layer, plain if vocabulary is None else vocabulary


def _is_packed(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype == torch.float32
