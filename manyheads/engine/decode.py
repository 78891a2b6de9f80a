"""A decoding row's part of a step, on the device: from its draft to the tokens of its tree, from the verdict to its
next state. On a GPU nothing here waits, and shapes depend on what the host knows: a CUDA graph can hold all of it.
There, kernels take the place of what stands here in torch's operations, some fifty of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.engine.state import RowState
from manyheads.kv_cache import KVCache
from manyheads.models.ops import has_kernels
from manyheads.speculation.planner import SIZES
from manyheads.speculation.tree import TreeTensors
from manyheads.speculation.verify import Verdict, agrees, longest_path


@dataclass(frozen=True, eq=False)
class InFlight:
    """R rows and their T in-flight tokens, row after row."""

    index: Tensor  # [R] int64, slots of the row state
    row_start: Tensor  # [R + 1] int32, row r's tokens are row_start[r] … row_start[r + 1] - 1
    tokens: Tensor  # [T] int64
    position: Tensor  # [T] int64, of the tokens themselves
    slots: Tensor  # [T] int64, cache slots
    bits: Tensor  # [T] int64, bit j: the row's token j is this one or above it; 0 is a chain


@dataclass(frozen=True, eq=False)
class Trees:
    """Decoding rows, and which of a tree's n nodes each of them brings: its own most probable ones.

    A row's tokens are its nodes in the tree's order, so parents come before their children.
    """

    inflight: InFlight
    tree: TreeTensors
    node_tokens: Tensor  # [R, n] int64, what every node would hold
    taken: Tensor  # [R, n] bool, whether the row may accept the node
    rank: Tensor  # [R, n] int64, a node's place among its row's tokens
    row: Tensor  # [T] int64
    node: Tensor  # [T] int64
    row_slots: Tensor  # [R, n] int64, cache slots of the row's tokens by place
    gains: Tensor | None  # [S] float32, what the heads expect of so many tokens, beside the roots; None for these alone

    @property
    def place(self) -> Tensor:
        """[R, n] int64, where a node stands among all tokens; its row's root where it was not taken."""
        first = self.inflight.row_start[:-1, None].to(torch.int64)
        return first + torch.where(self.taken, self.rank, 0)


def expand(state: RowState, index: Tensor, tree: TreeTensors, num_tokens: int, sizes: Tensor | None = None) -> Trees:
    """The trees of decoding rows, `num_tokens` in all: every row's root, and of all rows' nodes the most probable.

    A node's probability is the product of what the heads gave the candidates on its path. So a row that is easy to
    predict brings more nodes than one that is not.

    Args:
        index: [R] int64, slots of the row state.
        tree: the nodes that a row may bring.
        num_tokens: at least R, at most R · n.
        sizes: [S] int64, numbers of tokens, at most R · n, whose `Trees.gains` are wanted.
    """
    if has_kernels(index.device):
        from manyheads.kernels import trees as kernels

        return kernels.expand(state, index, tree, num_tokens, sizes)
    num_rows, num_nodes = index.shape[0], tree.num_nodes
    node_tokens = state.drafts[index[:, None], tree.column]
    cached = state.cached_len[index]
    slot = cached[:, None] + tree.order
    page = state.block_table[index[:, None], slot // state.block_size]
    row_slots = page * state.block_size + slot % state.block_size
    if num_nodes == 1:
        rows = torch.arange(num_rows, device=index.device)
        nothing = torch.zeros_like(rows)
        starts = torch.arange(num_rows + 1, device=index.device, dtype=torch.int32)
        inflight = InFlight(index, starts, node_tokens[:, 0], cached, row_slots[:, 0], nothing + 1)
        taken = torch.ones_like(node_tokens, dtype=torch.bool)
        return Trees(inflight, tree, node_tokens, taken, nothing[:, None], rows, nothing, row_slots, None)

    chance = state.chances[index[:, None], tree.column]
    value = chance
    for _ in range(tree.max_depth - 1):
        value = chance * value[:, tree.parent]  # each turn takes in an ancestor more; the root's chance is 1
    value[:, 0] = 2.0  # roots first
    # stable: of equals the earlier, so that no node comes before its parent
    ordered, order = value.flatten().sort(descending=True, stable=True)
    ordered[:num_rows] = 0.0  # the roots
    gains = None if sizes is None else ordered.cumsum(0)[sizes - 1]
    ids = order[:num_tokens].sort().values
    chosen = torch.zeros(num_rows * num_nodes, dtype=torch.bool, device=index.device).index_fill_(0, ids, True)
    chosen = chosen.view(num_rows, num_nodes)
    upto = chosen.cumsum(1)  # [R, n]
    rank = upto - 1
    row, node = ids // num_nodes, ids % num_nodes
    row_start = torch.zeros(num_rows + 1, dtype=torch.int32, device=index.device)
    row_start[1:] = upto[:, -1].cumsum(0)
    depth = tree.depth[node]
    above = rank[row[:, None], tree.path[node]]  # [T, D + 1], places of the tokens on the path, padded with the last
    on_path = torch.arange(above.shape[1], device=index.device) <= depth[:, None]
    bits = ((on_path.to(torch.int64)) << above).sum(1)
    inflight = InFlight(
        index=index,
        row_start=row_start,
        tokens=node_tokens[row, node],
        position=cached[row] + depth,
        slots=row_slots[row, rank[row, node]],
        bits=bits,
    )
    # a node without a chance only fills the step up
    return Trees(inflight, tree, node_tokens, chosen & (value > 0), rank, row, node, row_slots, gains)


def gain_sizes(num_rows: int, num_nodes: int, device: torch.device) -> Tensor | None:
    """The numbers of tokens whose gains the planner wants to know (by `SIZES`); None for roots alone."""
    if num_nodes == 1:
        return None
    sizes = [min(int(size * num_rows), num_rows * num_nodes) for size in SIZES]
    return torch.tensor(sizes).to(device, non_blocking=True)


def chain(state: RowState, index: Tensor, tokens: Tensor) -> InFlight:
    """A chunk of one row's known tokens [T]."""
    count = tokens.shape[0]
    position = state.cached_len[index] + torch.arange(count, device=tokens.device)
    page = state.block_table[index, position // state.block_size]
    slots = page * state.block_size + position % state.block_size
    row_start = torch.tensor([0, count], dtype=torch.int32).to(tokens.device, non_blocking=True)
    return InFlight(index, row_start, tokens, position, slots, torch.zeros_like(tokens))


def verify(trees: Trees, target: Tensor, accepted: Tensor | None = None) -> Verdict:
    """The longest accepted path of each row.

    Args:
        target: [T] int64, the token that the target model continues each token with.
        accepted: [R, n] bool, for rows with a lossy rule; None accepts what the target drew.
    """
    every = target[trees.place]  # [R, n]; what stands at nodes that were not taken is never looked at
    if accepted is None:
        agreeing = agrees(trees.node_tokens, every, trees.tree) & trees.taken
        return longest_path(trees.node_tokens, every, agreeing, trees.tree)
    return longest_path(trees.node_tokens, every, accepted & trees.taken, trees.tree, lossy=True)


def advance(state: RowState, cache: KVCache, trees: Trees, verdict: Verdict) -> Tensor:
    """Keep what was accepted: its K/V go to the end of the row's prefix, the row moves on.

    Returns:
        [R, 3 + 2 · (D + 1) + H · K] int64 for the host: tokens gained, tokens brought, depth of the deepest, which
        tokens, the nodes that drew them, and the candidates that were known when the step began.
    """
    index = trees.inflight.index
    last = verdict.num_accepted[:, None]
    if trees.tree.num_nodes > 1:
        _compact(cache, trees, verdict)
        brought = trees.taken.sum(1, keepdim=True)
        deepest = torch.where(trees.taken, trees.tree.depth, 0).amax(1, keepdim=True)
    else:
        brought, deepest = last, last - 1
    parts = (last, brought, deepest, verdict.emitted, verdict.path, state.candidates[index])
    report = torch.cat(parts, dim=1)
    state.cached_len.index_add_(0, index, verdict.num_accepted)
    state.drafts[index, 0] = verdict.emitted.gather(1, last - 1)[:, 0]
    return report


def last_token(trees: Trees, verdict: Verdict) -> Tensor:
    """[R] int64, where each row's last accepted token stands among all tokens."""
    return trees.place.gather(1, verdict.last[:, None])[:, 0]


def settle(state: RowState, cache: KVCache, trees: Trees, target: Tensor) -> tuple[Tensor, Tensor]:
    """Keep what the target drew: `verify`, `advance` and `last_token` for rows without a lossy rule.

    The dummy row stays where it is, however often it stands among the rows.

    Returns:
        `advance`'s report, and `last_token`.
    """
    if has_kernels(cache.device):
        from manyheads.kernels import settle as kernels

        return kernels.settle(state, cache, trees, target)
    verdict = verify(trees, target)
    report = advance(state, cache, trees, verdict)
    state.cached_len[state.num_rows] = 0
    return report, last_token(trees, verdict)


def _compact(cache: KVCache, trees: Trees, verdict: Verdict) -> None:
    """Move the K/V of an accepted path's nodes to the first slots of the row's in-flight tokens."""
    path = trees.rank.gather(1, verdict.path)  # places, which are never smaller than depths
    if has_kernels(cache.device):
        from manyheads.kernels.compact import compact

        compact(cache, trees.row_slots, path, verdict.num_accepted)
        return
    depth = torch.arange(path.shape[1], device=cache.device)
    moved = (path != depth) & (depth < verdict.num_accepted[:, None])
    if bool(moved.any()):
        source = trees.row_slots.gather(1, path)[moved]
        destination = trees.row_slots[:, : depth.numel()][moved]
        cache.move(source, destination)
