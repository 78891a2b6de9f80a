"""After the target has spoken: what each row keeps and reports, and its candidates for the next step, a kernel each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.batch import Outcome, RowState, Trees
from manyheads.kernels.compact import compact
from manyheads.kernels.dependent import begin, dependent
from manyheads.kv_cache import KVCache


def settle(state: RowState, cache: KVCache, trees: Trees, target: Tensor) -> Outcome:
    """As `Ops.settle`, where the target's own tokens are accepted.

    Args:
        target: [T] int64, contiguous.
    """
    tree, index = trees.tree, trees.inflight.index
    num_rows, num_nodes, width = index.shape[0], tree.num_nodes, tree.max_depth + 1
    num_candidates = state.candidates.shape[1]

    def longs(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=index.device)

    values = longs(num_rows, 3 + 2 * width + num_candidates)
    last, accepted, places = longs(num_rows), longs(num_rows), longs(num_rows, width)
    _settle_kernel[(num_rows,)](
        index,
        state.cached_len,
        state.drafts,
        tree.parent,
        tree.depth,
        tree.bits,
        tree.path,
        trees.inflight.row_start,
        trees.node_tokens,
        trees.taken,
        trees.offset,
        target,
        values,
        last,
        accepted,
        places,
        num_nodes,
        num_candidates,
        state.num_rows,
        state.drafts.stride(0),
        width,
        BLOCK=triton.next_power_of_2(num_nodes),
        BLOCK_WIDTH=triton.next_power_of_2(width),
        BLOCK_CANDIDATES=triton.next_power_of_2(max(num_candidates, 1)),
        num_warps=1,
        **dependent(index.device),
    )
    if num_nodes > 1:
        compact(cache, trees.row_slots, places, accepted)
    return Outcome(values, last)


def propose(state: RowState, index: Tensor, candidates: Tensor, chances: Tensor) -> None:
    """As `Ops.propose`; the dummy row keeps what it has.

    Args:
        index: [R] int64, contiguous.
        candidates, chances: [R, C] int64 and float32, the last dimension contiguous.
    """
    count = candidates.shape[1]
    _propose_kernel[(index.shape[0],)](
        index,
        candidates,
        chances,
        state.speculative,
        state.drafts,
        state.chances,
        count,
        state.num_rows,
        candidates.stride(0),
        chances.stride(0),
        state.speculative.stride(0),
        state.drafts.stride(0),
        state.chances.stride(0),
        BLOCK=triton.next_power_of_2(count),
        num_warps=1,
        **dependent(index.device),
    )


@triton.jit(do_not_specialize=["num_nodes", "num_candidates", "dummy", "width"])
def _settle_kernel(
    index,
    cached_len,
    drafts,
    parents,
    depths,
    tree_bits,
    paths,
    row_start,
    node_tokens,
    taken,
    offsets,
    target,
    report,
    last_places,
    num_accepted,
    path_offsets,
    num_nodes,
    num_candidates,
    dummy,
    stride_drafts,
    width,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_CANDIDATES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a row."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, BLOCK).to(tl.int64)
    inside = node < num_nodes
    step = tl.arange(0, BLOCK_WIDTH)
    on_path = step < width
    candidate = tl.arange(0, BLOCK_CANDIDATES)
    of_row = row * num_nodes
    out = report + row * (3 + 2 * width + num_candidates)

    slot_row = tl.load(index + row)
    first = tl.load(row_start + row).to(tl.int64)
    parent = tl.load(parents + node, mask=inside, other=0)
    depth = tl.load(depths + node, mask=inside, other=0)
    above = tl.load(tree_bits + node, mask=inside, other=-1)
    token = tl.load(node_tokens + of_row + node, mask=inside, other=-1)
    may = tl.load(taken + of_row + node, mask=inside, other=0) != 0
    # what a row did not bring stands at its root, and is never looked at
    parent_may = tl.load(taken + of_row + parent, mask=inside, other=0) != 0
    parent_offset = tl.load(offsets + of_row + parent, mask=inside & parent_may, other=0)
    wanted = tl.load(target + first + parent_offset, mask=inside, other=-2)
    held = tl.sum(tl.where(may & (token == wanted), tl.full((BLOCK,), 1, tl.int64) << node, 0), 0) | 1
    reached = inside & ((above & ~held) == 0)
    best = tl.max(tl.where(reached, depth * 64 + 63 - node, 0), 0)  # the deepest, of equals the first
    last = 63 - best % 64
    accepted = best // 64 + 1

    path = tl.load(paths + last * width + step, mask=on_path, other=0)
    offset = tl.load(offsets + of_row + path, mask=on_path, other=0)  # all on the path were brought
    emitted = tl.load(target + first + offset, mask=on_path, other=0)
    last_place = first + tl.sum(tl.where(step == accepted - 1, offset, 0), 0)
    newest = tl.sum(tl.where(step == accepted - 1, emitted, 0), 0)
    known = tl.load(drafts + slot_row * stride_drafts + 1 + candidate, mask=candidate < num_candidates, other=0)
    tl.store(out, accepted)
    tl.store(out + 1, tl.sum(may.to(tl.int64), 0))
    tl.store(out + 2, tl.max(tl.where(may, depth, 0), 0))
    tl.store(out + 3 + step, emitted, mask=on_path)
    tl.store(out + 3 + width + step, path, mask=on_path)
    tl.store(out + 3 + 2 * width + candidate, known, mask=candidate < num_candidates)
    tl.store(last_places + row, last_place)
    tl.store(num_accepted + row, accepted)
    tl.store(path_offsets + row * width + step, offset, mask=on_path)
    if slot_row != dummy:
        tl.store(cached_len + slot_row, tl.load(cached_len + slot_row) + accepted)
        tl.store(drafts + slot_row * stride_drafts, tl.maximum(newest, 0))


@triton.jit(
    do_not_specialize=["dummy", "stride_candidates", "stride_given"],
    do_not_specialize_on_alignment=["candidates", "chances"],
)
def _propose_kernel(
    index,
    candidates,
    chances,
    speculative,
    drafts,
    state_chances,
    count,
    dummy,
    stride_candidates,
    stride_given,
    stride_speculative,
    stride_drafts,
    stride_chances,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a row."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < count
    slot_row = tl.load(index + row)
    candidate = tl.load(candidates + row * stride_candidates + at, mask=inside, other=0)
    chance = tl.load(chances + row * stride_given + at, mask=inside, other=0.0)
    allowed = tl.load(speculative + slot_row * stride_speculative)
    inside &= slot_row != dummy
    tl.store(drafts + slot_row * stride_drafts + 1 + at, candidate, mask=inside)
    tl.store(state_chances + slot_row * stride_chances + 1 + at, chance * allowed, mask=inside)
