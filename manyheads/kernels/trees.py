"""Decoding rows' trees, from their drafts to the step's tokens: two kernels and a sort, or one kernel for roots alone.

What `TorchOps.expand` says in torch; see there for what is brought. The chosen nodes are those that do not come
after the last of them in the (stable) sort, so each row finds its own, and its place among all tokens, by comparing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.batch import InFlight, RowState, Trees, TreeTensors
from manyheads.kernels.dependent import begin, dependent

_CHUNK = 4096
"""Values that a program reads at once."""
_ROOTS = 128
"""Rows of a program where all are roots alone."""


def expand(state: RowState, index: Tensor, tree: TreeTensors, num_tokens: int, sizes: Tensor | None = None) -> Trees:
    """As `Ops.expand`.

    Args:
        index: [R] int64, contiguous.
        tree: of n nodes, at most 64; its tensors contiguous.
        num_tokens: from R to R · n.
        sizes: [S] int64, contiguous, numbers of tokens whose gains are wanted.
    """
    num_rows, num_nodes = index.shape[0], tree.num_nodes

    def longs(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=index.device)

    inflight = InFlight(
        index=index,
        row_start=torch.empty(num_rows + 1, dtype=torch.int32, device=index.device),
        tokens=longs(num_tokens),
        position=longs(num_tokens),
        slots=longs(num_tokens),
        bits=longs(num_tokens),
    )
    row, node = longs(num_tokens), longs(num_tokens)
    taken = torch.empty((num_rows, num_nodes), dtype=torch.bool, device=index.device)
    if num_nodes == 1:
        _roots_kernel[(num_rows // _ROOTS + 1,)](
            index,
            state.cached_len,
            state.drafts,
            state.page_table,
            inflight.row_start,
            inflight.tokens,
            inflight.position,
            inflight.slots,
            inflight.bits,
            row,
            node,
            taken,
            num_rows,
            state.drafts.stride(0),
            state.page_table.stride(0),
            PAGE_SIZE=state.page_size,
            BLOCK=_ROOTS,
            num_warps=4,
            **dependent(index.device),
        )
        tokens, slots = inflight.tokens[:, None], inflight.slots[:, None]
        return Trees(inflight, tree, tokens, taken, node[:, None], row, node, slots, None)

    block = triton.next_power_of_2(num_nodes)
    value = torch.empty((num_rows, num_nodes), dtype=torch.float32, device=index.device)
    _values_kernel[(num_rows,)](
        index,
        state.chances,
        tree.column,
        tree.depth,
        tree.path,
        value,
        num_nodes,
        tree.max_depth + 1,
        state.chances.stride(0),
        BLOCK=block,
        num_warps=1,
        **dependent(index.device),
    )
    ordered, order = value.flatten().sort(descending=True, stable=True)
    gains = None if sizes is None else torch.empty(sizes.shape, dtype=torch.float32, device=index.device)
    trees = Trees(
        inflight=inflight,
        tree=tree,
        node_tokens=longs(num_rows, num_nodes),
        taken=taken,
        offset=longs(num_rows, num_nodes),
        row=row,
        node=node,
        row_slots=longs(num_rows, num_nodes),
        gains=gains,
    )
    _bring_kernel[(num_rows + (0 if sizes is None else sizes.shape[0]),)](
        index,
        state.cached_len,
        state.drafts,
        state.page_table,
        tree.column,
        tree.depth,
        tree.bits,
        value,
        ordered,
        order,
        order if sizes is None else sizes,  # without sizes neither is touched
        ordered if gains is None else gains,
        inflight.row_start,
        inflight.tokens,
        inflight.position,
        inflight.slots,
        inflight.bits,
        row,
        node,
        trees.node_tokens,
        taken,
        trees.offset,
        trees.row_slots,
        num_rows,
        num_nodes,
        num_tokens,
        state.drafts.stride(0),
        state.page_table.stride(0),
        PAGE_SIZE=state.page_size,
        BLOCK=block,
        CHUNK=_CHUNK,
        num_warps=4,
        **dependent(index.device),
    )
    return trees


@triton.jit
def _slots(page_table, row, position, inside, stride_table, PAGE_SIZE: tl.constexpr):
    """Cache slots of positions of a row, or of one position of each row."""
    page = tl.load(page_table + row * stride_table + position // PAGE_SIZE, mask=inside, other=0)
    return page * PAGE_SIZE + position % PAGE_SIZE


@triton.jit(do_not_specialize=["num_rows"])
def _roots_kernel(
    index,
    cached_len,
    drafts,
    page_table,
    row_start,
    tokens,
    positions,
    slots,
    bits,
    rows,
    nodes,
    taken,
    num_rows,
    stride_drafts,
    stride_table,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a block of rows, one token each."""
    begin(DEPENDENT)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_rows
    row = tl.load(index + at, mask=inside, other=0)
    cached = tl.load(cached_len + row, mask=inside, other=0)
    token = tl.load(drafts + row * stride_drafts, mask=inside, other=0)
    tl.store(row_start + at, at, mask=at <= num_rows)
    tl.store(tokens + at, token, mask=inside)
    tl.store(positions + at, cached, mask=inside)
    tl.store(slots + at, _slots(page_table, row, cached, inside, stride_table, PAGE_SIZE), mask=inside)
    tl.store(bits + at, tl.full((BLOCK,), 1, tl.int64), mask=inside)
    tl.store(rows + at, at.to(tl.int64), mask=inside)
    tl.store(nodes + at, tl.zeros((BLOCK,), tl.int64), mask=inside)
    tl.store(taken + at, inside, mask=inside)


@triton.jit(do_not_specialize=["num_nodes", "width"])
def _values_kernel(
    index,
    chances,
    column,
    depths,
    path,
    values,
    num_nodes,
    width,
    stride_chances,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a row's nodes, how probable each is: the product of the chances on its path, from the root down."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, BLOCK)
    inside = node < num_nodes
    chances += tl.load(index + row) * stride_chances
    depth = tl.load(depths + node, mask=inside, other=0)
    value = tl.full((BLOCK,), 1.0, tl.float32)
    for at in range(1, width):
        on_path = inside & (at <= depth)
        above = tl.load(path + node * width + at, mask=on_path, other=0)
        where = tl.load(column + above, mask=on_path, other=0)
        value *= tl.load(chances + where, mask=on_path, other=1.0)
    # roots first; what is not a number would be neither before nor after any other
    value = tl.where(node == 0, 2.0, tl.where(value > 0, value, 0.0))
    tl.store(values + row * num_nodes + node, value, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_nodes", "num_tokens"])
def _bring_kernel(
    index,
    cached_len,
    drafts,
    page_table,
    column,
    depths,
    tree_bits,
    values,
    ordered,
    order,
    sizes,
    gains,
    row_start,
    tokens,
    positions,
    slots,
    bits,
    rows,
    nodes,
    node_tokens,
    taken,
    offsets,
    row_slots,
    num_rows,
    num_nodes,
    num_tokens,
    stride_drafts,
    stride_table,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a row's tokens; behind the rows, one of the gains."""
    begin(DEPENDENT)
    program = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    node = tl.arange(0, BLOCK)
    inside = node < num_nodes
    if program >= num_rows:
        size = tl.load(sizes + program - num_rows).to(tl.int32)
        gained = tl.zeros((CHUNK,), tl.float32)
        for start in range(num_rows, size, CHUNK):  # roots stand first
            gained += tl.load(ordered + start + lane, mask=start + lane < size, other=0.0)
        tl.store(gains + program - num_rows, tl.sum(gained, 0))
        return

    row = program.to(tl.int64)
    first = program * num_nodes
    least = tl.load(ordered + num_tokens - 1)
    latest = tl.load(order + num_tokens - 1)  # of those with that value
    # how many the rows before bring
    before = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, first, CHUNK):
        flat = start + lane
        value = tl.load(values + flat, mask=flat < first, other=-1.0)
        before += ((value > least) | ((value == least) & (flat <= latest))).to(tl.int32)
    begins = tl.sum(before, 0)

    value = tl.load(values + first + node, mask=inside, other=-1.0)
    chosen = (value > least) | ((value == least) & (first + node <= latest))
    offset = tl.cumsum(chosen.to(tl.int64), 0) - 1
    tl.store(row_start + row, begins)
    if program == num_rows - 1:
        tl.store(row_start + num_rows, num_tokens)

    slot_row = tl.load(index + row)
    cached = tl.load(cached_len + slot_row)
    where = tl.load(column + node, mask=inside, other=0)
    depth = tl.load(depths + node, mask=inside, other=0)
    above = tl.load(tree_bits + node, mask=inside, other=0)
    token = tl.load(drafts + slot_row * stride_drafts + where, mask=inside, other=0)
    of_row = row * num_nodes + node
    tl.store(node_tokens + of_row, token, mask=inside)
    tl.store(taken + of_row, chosen & (value > 0), mask=inside)  # a node without a chance only fills the step up
    tl.store(offsets + of_row, offset, mask=inside)
    slot = _slots(page_table, slot_row, cached + node, inside, stride_table, PAGE_SIZE)
    tl.store(row_slots + of_row, slot, mask=inside)

    at = begins + offset
    tl.store(tokens + at, token, mask=chosen)
    tl.store(positions + at, cached + depth, mask=chosen)
    slot = _slots(page_table, slot_row, cached + offset, chosen, stride_table, PAGE_SIZE)
    tl.store(slots + at, slot, mask=chosen)
    # all above a chosen node are chosen; the sum of different bits sets each of them
    bit = tl.full((BLOCK,), 1, tl.int64) << offset
    on_path = ((above[:, None] >> node[None, :].to(tl.int64)) & 1) != 0
    tl.store(bits + at, tl.sum(tl.where(on_path, bit[None, :], 0), 1), mask=chosen)
    tl.store(rows + at, tl.zeros((BLOCK,), tl.int64) + row, mask=chosen)
    tl.store(nodes + at, node.to(tl.int64), mask=chosen)
