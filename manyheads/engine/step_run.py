"""The one step: expand, forward, draw, verify and advance, propose. `recorded.py` records it; the runner runs it as it
is for what no recording serves.

The sampler stands between two halves: up to the hidden states of all tokens (`forward`), and from the tokens that the
target drew to the next candidates (`finish`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.attention.base import Group
from manyheads.batch import InFlight, RowState, Trees, TreeTensors
from manyheads.engine.step import Chunk
from manyheads.kv_cache import KVCache
from manyheads.models.llama import Llama
from manyheads.ops.base import Ops
from manyheads.speculation.draft import SIZES, Draft
from manyheads.speculation.drafter import Drafter, Kept


@dataclass(frozen=True, eq=False)
class DecodingRows:
    """Rows that decode, and the trees that they may bring."""

    index: Tensor  # [R] int64, slots of the row state; of about equal length side by side
    tree: TreeTensors
    num_tokens: int
    """Tokens that they bring in all."""
    depth: int
    """Of trees; 0 for roots alone, after which nothing is proposed."""
    max_cached_len: int
    """Bound of the tokens that a row has cached."""
    sizes: Tensor | None
    """[S] int64, numbers of tokens whose gains the planner wants to know; None for roots alone."""


@dataclass(frozen=True, eq=False)
class ChunkRows:
    """Rows that compute known tokens, one behind the other."""

    tokens: Tensor  # [T] int64
    row: Tensor  # [T] int64, which of the R rows a token belongs to
    place: Tensor  # [T] int64, in its chunk
    index: Tensor  # [R] int64, slots of the row state
    row_start: Tensor  # [R + 1] int32, where the rows' tokens begin
    max_tokens: int
    """Bounds of the tokens that a row brings,"""
    max_cached_len: int
    """and of those that it has cached."""


@dataclass(frozen=True, eq=False)
class TreeRows:
    """What rows with trees bring to a forward pass, and bounds that the host knows."""

    inflight: InFlight
    max_tokens: int
    """Tokens that a row brings at most,"""
    max_cached_len: int
    """and that it has cached."""


class StepRun:
    """A model with its drafter over the rows' state and cache: what a step does on the device."""

    def __init__(self, model: Llama, drafter: Drafter | None, ops: Ops, state: RowState, cache: KVCache) -> None:
        self.model, self.drafter, self.ops, self.state, self.cache = model, drafter, ops, state, cache
        config = model.config
        self.attention = ops.attention(cache, config.num_heads, config.rms_norm_eps, model.rope)

    def expand(self, decoding: DecodingRows) -> tuple[Trees, TreeRows]:
        """The trees that rows bring."""
        trees = self.ops.expand(self.state, decoding.index, decoding.tree, decoding.num_tokens, decoding.sizes)
        return trees, TreeRows(trees.inflight, decoding.tree.num_nodes, decoding.max_cached_len)

    def forward(self, chunks: ChunkRows | None, trees: TreeRows | None) -> Tensor:
        """One forward pass over the tokens of chunks and, behind them, of trees: hidden states [T, hidden]."""
        inflight: list[InFlight] = []
        groups: list[Group] = []
        if chunks is not None:
            inflight.append(self._chain(chunks))
            groups.append(self._group(inflight[0], 0, chunks.max_tokens, chunks.max_cached_len, is_chain=True))
        if trees is not None:
            start = groups[0].stop if groups else 0
            inflight.append(trees.inflight)
            groups.append(self._group(trees.inflight, start, trees.max_tokens, trees.max_cached_len))
        self.attention.plan(groups, _joined([x.position for x in inflight]), _joined([x.slots for x in inflight]))
        return self.model.forward(_joined([x.tokens for x in inflight]), self.attention)

    def finish(
        self,
        decoding: DecodingRows,
        trees: Trees,
        hidden: Tensor,
        target: Tensor,
        accepted: Tensor | None = None,
        others: Kept | None = None,
    ) -> Tensor:
        """Keep what agrees with the target, and propose what may come next.

        Args:
            hidden: [T, hidden], of the decoding rows' tokens.
            target: [T] int64, what the target drew after each of them.
            accepted: as `Ops.settle`'s.
            others: rows whose prompts ended in this step, a token each: the drafter proposes for them as well.

        Returns:
            `Outcome.values`.
        """
        outcome = self.ops.settle(self.state, self.cache, trees, target, accepted)
        width = trees.tree.max_depth + 1
        gained, tokens = outcome.values[:, :1], outcome.values[:, 3 : 3 + width]
        kept = Kept(decoding.index, hidden[outcome.last], tokens, gained)
        self.propose(kept if others is None else _both(others, kept), decoding.depth)
        return outcome.values

    def propose(self, kept: Kept, depth: int) -> None:
        """Candidates for rows' next trees of such depth."""
        if self.drafter is None:
            return
        self.drafter.observe(self.state, kept)
        if depth == 0:
            self.state.forget_candidates(kept.index)
        else:
            self.ops.propose(self.state, kept.index, *self.drafter.propose(self.state, kept, depth))

    def _chain(self, chunks: ChunkRows) -> InFlight:
        """Chunks behind their rows' prefixes."""
        rows = chunks.index[chunks.row]
        position = self.state.cached_len[rows] + chunks.place
        slots = self.state.slots(rows, position)
        bits = torch.zeros_like(chunks.tokens)
        return InFlight(chunks.index, chunks.row_start, chunks.tokens, position, slots, bits)

    def _group(
        self, inflight: InFlight, start: int, max_tokens: int, max_cached_len: int, is_chain: bool = False
    ) -> Group:
        """What attention needs to know of rows whose tokens begin at `start` of the step's."""
        index = inflight.index
        return Group(
            start=start,
            stop=start + inflight.tokens.shape[0],
            row_start=inflight.row_start,
            bits=inflight.bits,
            cached_len=self.state.cached_len[index],
            page_table=self.state.page_table[index],
            max_tokens=max_tokens,
            max_cached_len=max_cached_len,
            is_chain=is_chain,
        )


def chunk_numbers(chunks: Sequence[Chunk], num_tokens: int, dummy: int) -> tuple[list[list[int]], list[int]]:
    """Tokens, rows and places of chunks, padded to `num_tokens` by a last row, and where rows begin.

    Args:
        dummy: number of that row.
    """
    tokens: list[int] = []
    rows: list[int] = []
    places: list[int] = []
    for i, chunk in enumerate(chunks):
        cached, size = chunk.request.cached_len, chunk.num_inflight
        tokens += chunk.request.tokens[cached : cached + size]
        rows += [i] * size
        places += range(size)
    padding = num_tokens - len(tokens)
    starts = [0, *accumulate(chunk.num_inflight for chunk in chunks)]
    return [tokens + [0] * padding, rows + [dummy] * padding, [*places, *range(padding)]], starts


def gain_sizes(num_rows: int, draft: Draft, device: torch.device) -> Tensor | None:
    """The numbers of tokens whose gains the planner wants to know (by `SIZES`); None for roots alone."""
    num_nodes = draft.tree.num_nodes
    if num_nodes == 1:
        return None
    sizes = [min(int(size * num_rows), num_rows * num_nodes) for size in SIZES]
    return torch.tensor(sizes).to(device, non_blocking=True)


def _both(others: Kept, kept: Kept) -> Kept:
    """Rows that gained a token, and rows that gained some."""
    tokens = F.pad(others.tokens, (0, kept.tokens.shape[1] - others.tokens.shape[1]))
    return Kept(
        torch.cat((others.index, kept.index)),
        torch.cat((others.hidden, kept.hidden)),
        torch.cat((tokens, kept.tokens)),
        torch.cat((others.gained, kept.gained)),
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
