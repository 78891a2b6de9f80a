"""The one step: expand, forward, draw, verify and advance, propose. `recorded.py` records it; the runner runs it as it
is for what no recording serves.

The sampler stands between two halves: up to the hidden states of all tokens (`forward`), and from the tokens that the
target drew to the next candidates (`finish`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from manyheads.attention.base import Group
from manyheads.batch import InFlight, Outcome, RowState, Trees, TreeTensors, joined
from manyheads.engine.step import Chunk
from manyheads.kv_cache import KVCache
from manyheads.models.llama import Llama
from manyheads.ops.base import Ops
from manyheads.speculation.draft import SIZES, Draft
from manyheads.speculation.drafter import Chain, Drafter, Kept


@dataclass(frozen=True, eq=False)
class Hidden:
    """What a forward pass makes of T tokens of trees."""

    last: Tensor  # [T, hidden], after the final norm
    states: Tensor | None = None  # [T, k, hidden], the inputs of the k layers that the drafter reads

    def first(self, count: int) -> Hidden:
        """That of the first tokens."""
        return Hidden(self.last[:count], None if self.states is None else self.states[:count])


@dataclass(frozen=True, eq=False)
class ChunkHidden:
    """What a forward pass makes of the T tokens of C chunks."""

    ends: Tensor  # [C, hidden], of the chunks' last tokens, after the final norm
    is_finite: Tensor  # [T] bool, whether what is cached of the tokens are numbers
    states: Tensor | None  # [T, k, hidden], as of `Hidden`
    every: Tensor | None  # [T, hidden], after the final norm, where it was asked for


@dataclass(frozen=True, eq=False)
class DecodingRows:
    """Rows that decode, and the trees that they may bring."""

    index: Tensor  # [R] int64, slots of the row state; of about equal length side by side
    tree: TreeTensors
    num_tokens: int
    """Tokens that they bring in all."""
    nodes: float
    """That a row brings on average."""
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
        self.attention = ops.attention(cache, model.heads)
        self.base_layers: tuple[int, ...] = ()
        """Layers whose inputs the drafter reads."""
        if drafter is not None:
            self.base_layers = drafter.shape.base_layers
            drafter.attach(cache)

    def expand(self, decoding: DecodingRows) -> tuple[Trees, TreeRows]:
        """The trees that rows bring."""
        trees = self.ops.expand(self.state, decoding.index, decoding.tree, decoding.num_tokens, decoding.sizes)
        return trees, TreeRows(trees.inflight, decoding.tree.num_nodes, decoding.max_cached_len)

    def forward(
        self, chunks: ChunkRows | None, trees: TreeRows | None, every: bool = False
    ) -> tuple[ChunkHidden | None, Hidden]:
        """One forward pass over the tokens of chunks and, behind them, of trees; of which there may be none.

        Args:
            every: whether the hidden states of all tokens of chunks are wanted, and not of their last ones alone.
        """
        inflight: list[InFlight] = []
        groups: list[Group] = []
        if chunks is not None:
            inflight.append(self.chain(chunks))
            groups.append(self.chain_group(chunks, inflight[0]))
        if trees is not None:
            start = groups[0].stop if groups else 0
            inflight.append(trees.inflight)
            groups.append(self._group(trees.inflight, start, trees.max_tokens, trees.max_cached_len))
        if self.model.adapters is not None:
            self.model.adapters.plan(joined([self._adapters(x) for x in inflight]))
        tokens = joined([x.tokens for x in inflight])
        self.attention.plan(groups, joined([x.position for x in inflight]), joined([x.slots for x in inflight]))
        model, states, inputs = self.model, None, None
        if self.base_layers:
            shape = (len(tokens), len(self.base_layers), model.config.hidden_size)
            states = torch.empty(shape, dtype=model.dtype, device=model.device)
            inputs = dict(zip(self.base_layers, states.unbind(1), strict=True))
        if chunks is None:
            return None, Hidden(model.forward(tokens, self.attention, inputs), states)
        count = len(chunks.tokens)
        ends = chunks.row_start[1:].to(torch.int64) - 1
        is_finite = torch.empty(count, dtype=torch.bool, device=model.device)
        read = None if every else torch.cat((ends, torch.arange(count, len(tokens), device=model.device)))
        last = model.forward(tokens, self.attention, inputs, read, is_finite)
        known, others = last.tensor_split((count if every else len(ends),))
        known_states, other_states = (None, None) if states is None else states.tensor_split((count,))
        of_chunks = ChunkHidden(known[ends] if every else known, is_finite, known_states, known if every else None)
        return of_chunks, Hidden(others, other_states)

    def finish(
        self,
        decoding: DecodingRows,
        trees: Trees,
        hidden: Hidden,
        target: Tensor,
        accepted: Tensor | None = None,
    ) -> Tensor:
        """Keep what agrees with the target, and propose what may come next.

        Args:
            hidden: of the decoding rows' tokens.
            target: [T] int64, what the target drew after each of them.
            accepted: as `Ops.settle`'s.

        Returns:
            `Outcome.values`.
        """
        outcome = self.ops.settle(self.state, self.cache, trees, target, accepted)
        width = trees.tree.max_depth + 1
        gained, tokens = outcome.values[:, :1], outcome.values[:, 3 : 3 + width]
        kept = Kept(decoding.index, hidden.last[outcome.last], tokens, gained)
        if hidden.states is not None:
            kept = self._with_chain(kept, trees, outcome, hidden.states)
        self.propose(kept, decoding.depth, decoding.nodes)
        return outcome.values

    def propose(self, kept: Kept, depth: int, nodes: float) -> None:
        """Candidates for rows' next trees of such depth, and of so many nodes on average."""
        if self.drafter is None:
            return
        self.drafter.observe(self.state, kept)
        if depth == 0:
            self.state.forget_candidates(kept.index)
        else:
            self.ops.propose(self.state, kept.index, *self.drafter.propose(self.state, kept, depth, nodes))

    def chain(self, chunks: ChunkRows) -> InFlight:
        """Chunks behind their rows' prefixes."""
        rows = chunks.index[chunks.row]
        position = self.state.cached_len[rows] + chunks.place
        slots = self.state.slots(rows, position)
        bits = torch.zeros_like(chunks.tokens)
        return InFlight(chunks.index, chunks.row_start, chunks.tokens, position, slots, bits)

    def chain_group(self, chunks: ChunkRows, inflight: InFlight) -> Group:
        """The same rows, as attention wants them, at the beginning of a pass."""
        return self._group(inflight, 0, chunks.max_tokens, chunks.max_cached_len, is_chain=True)

    def _adapters(self, inflight: InFlight) -> Tensor:
        """[T] int64, the adapter of each token: its row's."""
        place = torch.arange(len(inflight.tokens), dtype=torch.int32, device=inflight.tokens.device)
        row = torch.searchsorted(inflight.row_start[1:], place, right=True)
        return self.state.adapter[inflight.index[row]]

    def _with_chain(self, kept: Kept, trees: Trees, outcome: Outcome, states: Tensor) -> Kept:
        """What a step kept of trees, with the tokens themselves, packed: as many as there may be.

        Args:
            states: [T, k, hidden], of all tokens of the trees.
        """
        state, (rows, width) = self.state, kept.tokens.shape
        # a CPU knows how many there are; a GPU is not asked
        size = int(kept.gained.sum()) if state.device.type == "cpu" else min(rows * width, states.shape[0])
        gained = self.ops.pack(state, trees, outcome, size)
        inflight = gained.inflight
        group = Group(
            start=0,
            stop=size,
            row_start=inflight.row_start,
            bits=inflight.bits,
            cached_len=gained.cached_len,
            page_table=state.page_table[inflight.index],
            max_tokens=width,
            max_cached_len=state.max_len,
        )
        chain = Chain(group, states[gained.place], inflight.tokens, inflight.position, inflight.slots)
        return replace(kept, chains=(chain,), last=gained.last)

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


def chunk_rows(state: RowState, chunks: list[Chunk]) -> ChunkRows:
    """Chunks as they are, on their way to the device."""
    numbers, starts = chunk_numbers(chunks, sum(chunk.num_inflight for chunk in chunks), 0)
    tokens, row, place = state.tensor(numbers).unbind()
    return ChunkRows(
        tokens=tokens,
        row=row,
        place=place,
        index=state.tensor([chunk.request.row for chunk in chunks]),
        row_start=state.tensor(starts, torch.int32),
        max_tokens=max(chunk.num_inflight for chunk in chunks),
        max_cached_len=max(chunk.request.cached_len for chunk in chunks),
    )


def chunk_numbers(chunks: Sequence[Chunk], num_tokens: int, dummy: int) -> tuple[list[list[int]], list[int]]:
    """Tokens, rows and places of chunks, padded to `num_tokens` by a last row that stands at its beginning with all of
    them, and where rows begin.

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
    return [tokens + [0] * padding, rows + [dummy] * padding, places + [0] * padding], starts


def gain_sizes(num_rows: int, draft: Draft, device: torch.device) -> Tensor | None:
    """The numbers of tokens whose gains the planner wants to know (by `SIZES`); None for roots alone."""
    num_nodes = draft.tree.num_nodes
    if num_nodes == 1:
        return None
    sizes = [min(int(size * num_rows), num_rows * num_nodes) for size in SIZES]
    return torch.tensor(sizes).to(device, non_blocking=True)
