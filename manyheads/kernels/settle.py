"""After the target has spoken: what each row keeps and reports, its new tokens one behind the other, and its candidates
for the next step, a kernel each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.batch import Gained, InFlight, Outcome, RowState, Trees
from manyheads.kernels.compact import compact
from manyheads.kernels.dependent import begin, dependent
from manyheads.kv_cache import KVCache

_CHUNK = 1024
"""Rows, or tokens that pad, that a program looks at at once."""


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


def pack(state: RowState, trees: Trees, outcome: Outcome, size: int) -> Gained:
    """As `Ops.pack`.

    Args:
        outcome: its values contiguous.
    """
    index, width = trees.inflight.index, trees.tree.max_depth + 1
    rows = index.shape[0]

    def longs(number: int) -> Tensor:
        return torch.empty(number, dtype=torch.int64, device=index.device)

    inflight = InFlight(
        index=longs(rows + 1),
        row_start=torch.empty(rows + 2, dtype=torch.int32, device=index.device),
        tokens=longs(size),
        position=longs(size),
        slots=longs(size),
        bits=longs(size),
    )
    gained = Gained(inflight, cached_len=longs(rows + 1), place=longs(size), last=longs(rows))
    _pack_kernel[(rows + 1,)](
        index,
        state.cached_len,
        state.page_table,
        trees.inflight.row_start,
        trees.offset,
        outcome.values,
        inflight.index,
        inflight.row_start,
        inflight.tokens,
        inflight.position,
        inflight.slots,
        inflight.bits,
        gained.cached_len,
        gained.place,
        gained.last,
        rows,
        width,
        size,
        state.num_rows,
        outcome.values.stride(0),
        trees.offset.stride(0),
        state.page_table.stride(0),
        PAGE_SIZE=state.page_size,
        BLOCK_WIDTH=triton.next_power_of_2(width),
        CHUNK=_CHUNK,
        num_warps=4,
        **dependent(index.device),
    )
    return gained


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


@triton.jit(do_not_specialize=["num_rows", "width", "size", "dummy", "stride_report", "stride_offsets", "stride_table"])
def _pack_kernel(
    index,
    cached_len,
    page_table,
    tree_start,
    offsets,
    report,
    out_index,
    row_start,
    tokens,
    positions,
    slots,
    bits,
    lengths,
    places,
    last,
    num_rows,
    width,
    size,
    dummy,
    stride_report,
    stride_offsets,
    stride_table,
    PAGE_SIZE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a row; behind the rows, what pads them."""
    begin(DEPENDENT)
    row = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    nothing = tl.zeros((CHUNK,), tl.int64)
    # how many the rows before gained
    before = nothing
    for start in range(0, row, CHUNK):
        other = start + lane
        before += tl.load(report + other.to(tl.int64) * stride_report, mask=other < row, other=0)
    begins = tl.sum(before, 0)
    tl.store(row_start + row, begins.to(tl.int32))
    if row == num_rows:
        tl.store(row_start + num_rows + 1, size)
        tl.store(out_index + row, dummy)
        tl.store(lengths + row, 0)
        for start in range(begins.to(tl.int32), size, CHUNK):
            at = start + lane
            tl.store(tokens + at, nothing, mask=at < size)
            tl.store(positions + at, nothing, mask=at < size)
            tl.store(slots + at, nothing, mask=at < size)
            tl.store(bits + at, nothing + 1, mask=at < size)
            tl.store(places + at, nothing, mask=at < size)
        return

    slot_row = tl.load(index + row)
    report += row.to(tl.int64) * stride_report
    gained = tl.load(report)
    first = tl.maximum(tl.load(cached_len + slot_row) - gained, 0)  # the dummy row gains tokens and stays where it is
    tl.store(out_index + row, slot_row)
    tl.store(lengths + row, first)
    tl.store(last + row, begins + gained - 1)
    depth = tl.arange(0, BLOCK_WIDTH)
    kept = depth < gained
    node = tl.load(report + 3 + width + depth, mask=kept, other=0)
    offset = tl.load(offsets + row.to(tl.int64) * stride_offsets + node, mask=kept, other=0)
    following = tl.load(report + 3 + depth, mask=kept, other=0)
    position = first + depth
    page = tl.load(page_table + slot_row * stride_table + position // PAGE_SIZE, mask=kept, other=0)
    at = begins + depth
    tl.store(tokens + at, tl.maximum(following, 0), mask=kept)
    tl.store(positions + at, position, mask=kept)
    tl.store(slots + at, page * PAGE_SIZE + position % PAGE_SIZE, mask=kept)
    tl.store(bits + at, (tl.full((BLOCK_WIDTH,), 2, tl.int64) << depth) - 1, mask=kept)
    tl.store(places + at, tl.load(tree_start + row) + offset, mask=kept)


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
