"""What an engine will take, from its shape alone: arithmetic, before gigabytes are loaded.

Each part is what is alive at the dearest moment, in bytes. Beside the weights it is

    scratch    activations of the largest step, then its logits and what the sampler makes of them
    graphs     logits of the largest captured step and its hidden states, those of the largest captured pass,
               activations once (they share a pool), CUDA's own for each
    state      rows, page tables, penalties' counts, rotary embeddings

and the K/V cache gets what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from manyheads.batch import MAX_NODES, RowState
from manyheads.config import ConfigError
from manyheads.engine import logprobs, penalties
from manyheads.engine.memory import Limit
from manyheads.engine.quickest import MOST_ADDED
from manyheads.engine.record_sizes import ROWS, TREE_ROWS, all_rows, pass_keys
from manyheads.kv_cache import KVCache, KVShape
from manyheads.models.config import ModelConfig
from manyheads.models.rope import POSITION_MARGIN
from manyheads.models.size import matrix_bytes, weights_bytes
from manyheads.ops.base import Ops
from manyheads.quantization.base import CodedScheme, Scheme
from manyheads.quantization.schemes import find
from manyheads.sizes import format_size
from manyheads.speculation.draft import SIZES, deepest
from manyheads.speculation.drafter import DrafterShape
from manyheads.speculation.planner import most_inflight

GRAPH_BYTES = 2 * 2**20
"""What CUDA takes for a captured step, some five hundred kernels, beside its tensors."""
NO_DRAFTER = DrafterShape(max_depth=0, num_candidates=0)
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
        """Bytes of all of it."""
        return self.weights + self.heads + self.state + self.scratch + self.graphs


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What an engine's size follows from."""

    model: ModelConfig
    drafter: DrafterShape | None
    dtype: torch.dtype
    """Of activations."""
    device: torch.device
    ops: Ops
    """Of the device."""
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    tree_size: int | None = None
    scheme: Scheme | None = None
    """Of weights; None leaves them in floating point."""
    adapter_numbers: int = 0
    """Numbers in the weights of adapters."""
    kv_dtype: torch.dtype | None = None
    """Of K/V, one of `kv_cache.CODES`; None is that of activations."""

    @property
    def num_drawn(self) -> int:
        """Most tokens of decoding rows in a step, at each of which one is drawn."""
        rows = self.max_num_seqs
        if self.drafter is None:
            return rows
        if self.tree_size is not None:
            return self.tree_size * rows
        return min(MAX_NODES * rows, most_inflight(rows))

    @property
    def page_bytes(self) -> int:
        """A page of the K/V cache, of a group of layers."""
        return self._page_bytes(self.kv_dtype or self.dtype)

    @property
    def most_pages(self) -> int:
        """What a row may ever hold, companions included."""
        pages = -(-(self.max_model_len + MAX_NODES) // self.page_size)
        if not self.kept.num_companions or self.kept.window is None:
            return pages
        near = -(-(self.kept.window + self.max_num_batched_tokens) // self.page_size) + 2
        return pages + self.kept.num_companions * min(pages, near)

    @property
    def kept(self) -> KVShape:
        """What a token keeps of K/V, a drafter's layers included."""
        return self.model.kv_shape.with_layers(self.drafter.kv_layers if self.drafter else 0)

    def _page_bytes(self, dtype: torch.dtype) -> int:
        return KVCache.zeros(self.kept, 1, self.page_size, dtype, torch.device("meta")).nbytes

    @property
    def page_cost(self) -> int:
        """What a page takes in the end. Attention may gather one layer's pages of the rows in a step, padded to twice
        their length at most, and widen codes."""
        if not self.ops.gathers_pages:
            return self.page_bytes
        gathered = self.page_bytes + (self._page_bytes(self.dtype) if self.kv_dtype is not None else 0)
        return self.page_bytes + 2 * gathered // self.kept.page_layers

    def parts(self) -> Parts:
        """Everything beside the K/V cache."""
        drafter, drafter_bytes = self.drafter, 0.0
        if drafter is not None:
            layer, vocabulary = matrix_bytes(self.dtype, self.device, self.model.dtype, self.scheme)
            drafter_bytes = drafter.layer_weights * layer + drafter.vocabulary_weights * vocabulary
        weights = weights_bytes(self.model, self.dtype, self.device, self.scheme)
        weights += self.adapter_numbers * self.dtype.itemsize
        return Parts(weights, int(drafter_bytes), self._state(), self._scratch(), self._graphs())

    def _state(self) -> int:
        """The rows' state, with the penalties' counts, and the table of rotary embeddings."""
        model, drafter = self.model, self.drafter or NO_DRAFTER
        state = RowState(
            self.max_num_seqs,
            self.max_model_len,
            self.page_size,
            drafter.num_candidates,
            model.vocab_size,
            torch.device("meta"),
            drafter.row_state,
        )
        state.count_tokens()
        table = 2 * (model.max_position_embeddings + POSITION_MARGIN) * model.head_dim * self.dtype.itemsize
        return state.nbytes + len(set(model.ropes)) * table

    def _scratch(self) -> int:
        tokens = self.max_num_batched_tokens + self.num_drawn
        drafter = self.drafter or NO_DRAFTER
        states = tokens * len(drafter.base_layers) * self.model.hidden_size * self.dtype.itemsize
        scratch = self._activations(tokens) + 2 * states + max(self._draw(), 4 * self._logits() + self._propose())
        if not self.ops.gathers_pages:
            return scratch + self.ops.library_bytes
        # masks: of every query head of a K/V head, before they are repeated, and as the bits they are made of
        queries = self.model.num_heads // self.model.num_kv_heads
        masks = len(set(self.model.windows)) * ((queries + 1) * self.dtype.itemsize + 3)
        # scores that are capped, or stand beside sinks, are all there at once, and once more as weights in float32
        has_scores = self.model.attention_softcap is not None or self.model.has_sinks
        scores = self.model.num_heads * 8 if has_scores else 0
        return scratch + tokens * self.max_model_len * (masks + scores)

    def _activations(self, tokens: int) -> int:
        """A layer's: residual, norm and a product in two float32 parts; q, k, v rotated, attended; gate, up, both.

        Of experts, gate, up and both for each that a token has, and as many parts.
        """
        model, experts = self.model, self.model.experts_per_token
        q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        width = 2 * model.hidden_size + 5 * q + 4 * kv + 3 * max(1, experts) * model.intermediate_size
        return tokens * (width * self.dtype.itemsize + 4 * max(2, experts) * model.hidden_size) + self._widened(tokens)

    def _widened(self, tokens: int) -> int:
        """What is widened at a time of a quantized weight, for products of so many tokens."""
        if not isinstance(self.scheme, CodedScheme) or tokens < self.scheme.widened_from:
            return 0
        columns = max(self.model.hidden_size, self.model.intermediate_size, self.model.num_heads * self.model.head_dim)
        return self.ops.widened_rows * columns * self.dtype.itemsize

    def _logits(self) -> int:
        """Numbers in the logits of the largest step."""
        return self.num_drawn * self.model.vocab_size

    def _draw(self) -> int:
        """The eager sampler's.

        Logits as computed, in float32 and over the temperature, what finds those that are left, and which are not. Or,
        when that is done, the noise for every row and depth, where it is made before it is added. Computed in float32,
        they are there once more for log-probabilities. And penalties, or log-probabilities, of so many tokens as are
        looked at together.
        """
        logits, vocab = self._logits(), self.model.vocab_size
        depths = 1 + (self.drafter.max_depth if self.drafter else 0)
        noise = self.ops.noise_bytes * self.max_num_seqs * depths * vocab
        looked_up = min(logprobs.AT_ONCE, max(self.max_num_batched_tokens, self.max_num_seqs * depths))
        at_once = max(32 * min(penalties.AT_ONCE, self.num_drawn), 16 * looked_up) * vocab
        drawn = (9 + self.ops.cutoff_bytes + self.dtype.itemsize) * logits
        kept = 4 * logits if self.dtype == torch.float32 else 0
        return max(drawn, 16 * logits + noise if noise else 0) + kept + at_once

    def _propose(self) -> int:
        """The drafter's: logits as computed, joined, in float32, exponentiated; top-k with indices."""
        drafter = self.drafter or NO_DRAFTER
        logits = drafter.row_logits * (2 * self.dtype.itemsize + 16)
        # a drafter that goes on from its own guesses looks at as many nodes of them as trees have
        rows = self.num_drawn if drafter.scratch_tokens else self.max_num_seqs
        return rows * logits + self.max_num_seqs * drafter.token_scratch * self.max_model_len

    def _graphs(self) -> int:
        """Captured at start-up for all sizes of trees, of all depths where these cost passes, else for the one that is
        used and for roots. What they return stands in places that they share: hidden states, those that a drafter
        reads, and a step's logits; of passes, chunks and trees apart."""
        if not self.ops.records:
            return 0
        model, drafter, most = self.model, self.drafter or NO_DRAFTER, self.max_num_seqs
        sizes: Sequence[float] = SIZES[1:]
        if self.drafter is None or self.tree_size is not None:
            sizes = [self.tree_size] if self.drafter and self.tree_size and self.tree_size > 1 else []
        elif drafter.nodes_within:
            by_depth = enumerate(drafter.nodes_within, 1)
            sizes = [n for depth, there in by_depth for n in {min(s, there) for s in sizes if depth <= deepest(s)}]
        tokens = all_rows(most, ROWS)
        for rows in all_rows(most, TREE_ROWS):
            inflight = most_inflight(rows) if self.tree_size is None else self.num_drawn
            tokens += [int(size * rows) for size in sizes if int(size * rows) <= inflight]
        keys = pass_keys(most, self.max_num_batched_tokens, self.num_drawn)
        passes = [chunks[0] + trees[0] + MOST_ADDED for chunks, trees in keys]
        hidden = (1 + len(drafter.base_layers)) * model.hidden_size
        largest = max(max(chunks[0], trees[0]) for chunks, trees in keys) + MOST_ADDED
        # logits as they are computed, too
        kept = (max(tokens) * (2 * model.vocab_size + hidden) + 2 * largest * hidden) * self.dtype.itemsize
        count = len(tokens) + len(passes)
        return count * GRAPH_BYTES + kept + self._activations(max(*tokens, *passes)) + self._propose()

    def pages_within(self, limit: Limit, parts: Parts) -> int:
        """Pages of K/V that there is room for; not positive where there is none."""
        return (limit.total - limit.base - parts.total) // self.page_cost

    def require(self, limit: Limit, parts: Parts, num_pages: int, asked_by: str | None = None) -> None:
        """See that a K/V cache of so many pages fits.

        Args:
            asked_by: the setting that asks for so many.

        Raises:
            ConfigError: it does not; with the size of every part, and what to change.
        """
        if self.pages_within(limit, parts) >= num_pages:
            return
        cache = num_pages * self.page_cost
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
        if self.drafter is not None:
            smaller["speculative=False"] = replace(self, drafter=None)
        if self.dtype == torch.float32 and self.device.type == "cuda":
            smaller["dtype=float16"] = replace(self, dtype=torch.float16)
        if self.scheme is None:
            for name in RECOMMENDED:
                smaller[f"quantization={name}"] = replace(self, scheme=find(name))
        total = self.parts().total
        return [(what, total - shape.parts().total) for what, shape in smaller.items()]
