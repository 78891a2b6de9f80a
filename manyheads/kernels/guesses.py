"""Between the passes of a drafter that goes on from its own guesses: a kernel before a pass, and one behind.

What `ops/guesses.py` says in torch. Each row's program finds by itself how much a node must be worth to be opened: the
bits of numbers that are not negative are ordered as these are, and of the n-th largest they are found one by one, by
counting how many numbers are no less.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.batch import Guesses, Level, OpenNodes, RowState
from manyheads.kernels.dependent import begin, dependent

_BLOCKS = {128: 1, 1024: 4, 8192: 16}
"""Values that a program holds, and its warps; what is beyond is read anew for each bit."""
_NODES = 64
"""Nodes of a row at most (`MAX_NODES`): those of a level, those that are opened, and a node's children."""


def begin_guesses(state: RowState, index: Tensor, num_candidates: int, most: int) -> Guesses:
    """As `Ops.begin_guesses`.

    Args:
        index: [R] int64, contiguous.
    """
    rows, width, device = index.shape[0], num_candidates + 2, index.device

    def longs(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=device)

    # NOTE: not parts of one tensor, whose alignment would depend on the rows: a variant of the kernels each
    guesses = Guesses(
        cached_len=longs(rows),
        tokens=longs(rows, width),
        chances=torch.empty(rows, width, device=device),
        worth=torch.empty(rows, width, device=device),
        above=longs(rows, width),
        feature=longs(rows, width),
        opened=longs(5, rows, most),
        row_start=torch.empty(rows + 1, dtype=torch.int32, device=device),
    )
    _begin_kernel[(rows,)](
        index,
        state.cached_len,
        state.page_table,
        state.speculative,
        guesses.cached_len,
        guesses.tokens,
        guesses.chances,
        guesses.worth,
        guesses.above,
        guesses.feature,
        guesses.opened,
        guesses.row_start,
        width,
        most,
        state.page_table.stride(0),
        state.speculative.stride(0),
        PAGE_SIZE=state.page_size,
        COLUMNS=2 * _NODES,
        NODES=_NODES,
        num_warps=1,
        **dependent(device),
    )
    return guesses


def open_nodes(guesses: Guesses, level: Level, count: int) -> OpenNodes:
    """As `Ops.open_nodes`."""
    rows, width = guesses.worth.shape
    most, size, device = guesses.opened.shape[2], level.columns.shape[0], guesses.worth.device
    total = guesses.num_opened + count

    def longs(number: int) -> Tensor:
        return torch.empty(number, dtype=torch.int64, device=device)

    nodes = OpenNodes(
        row_start=torch.empty_like(guesses.row_start),
        slots=longs(total),
        tokens=longs(total),
        source=longs(total),
        position=longs(total),
        bits=longs(total),
        new_row=longs(count),
        new_which=longs(count),
        new_at=longs(count),
    )
    block = next((block for block in _BLOCKS if block >= rows * size), max(_BLOCKS))
    _open_kernel[(rows,)](
        level.columns,
        level.parents,
        guesses.cached_len,
        guesses.tokens,
        guesses.worth,
        guesses.above,
        guesses.feature,
        guesses.opened,
        guesses.row_start,
        nodes.row_start,
        nodes.slots,
        nodes.tokens,
        nodes.source,
        nodes.position,
        nodes.bits,
        nodes.new_row,
        nodes.new_which,
        nodes.new_at,
        rows,
        width,
        size,
        most,
        level.depth,
        count,
        rows + guesses.num_opened,
        BLOCK=block,
        NODES=_NODES,
        num_warps=_BLOCKS[block],
        **dependent(device),
    )
    guesses.row_start, guesses.num_opened = nodes.row_start, total
    return nodes


def offer_children(
    guesses: Guesses,
    level: Level,
    nodes: OpenNodes | None,
    tokens: Tensor,
    chances: Tensor,
    token_map: Tensor | None,
) -> None:
    """As `Ops.offer_children`.

    Args:
        tokens, chances: contiguous.
    """
    _offer_kernel[(tokens.shape[0],)](
        level.columns,
        level.families,
        tokens if nodes is None else nodes.new_row,  # of roots, neither is touched
        tokens if nodes is None else nodes.new_which,
        tokens,
        chances,
        tokens if token_map is None else token_map,
        guesses.tokens,
        guesses.chances,
        guesses.worth,
        guesses.worth.shape[1],
        tokens.shape[1],
        ROOTS=nodes is None,
        MAPPED=token_map is not None,
        NODES=_NODES,
        num_warps=1,
        **dependent(tokens.device),
    )


@triton.jit(do_not_specialize=["width", "most", "stride_table", "stride_speculative"])
def _begin_kernel(
    index,
    cached_len,
    page_table,
    speculative,
    row_cached,
    tokens,
    chances,
    worth,
    above,
    feature,
    opened,
    row_start,
    width,
    most,
    stride_table,
    stride_speculative,
    PAGE_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    NODES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a row."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    at = row * width + column
    slot_row = tl.load(index + row)
    nothing = tl.zeros((COLUMNS,), tl.int64)
    tl.store(tokens + at, nothing, mask=inside)
    tl.store(above + at, nothing, mask=inside)
    tl.store(feature + at, nothing + tl.where(column == 0, row, 0), mask=inside)
    tl.store(chances + at, tl.zeros((COLUMNS,), tl.float32), mask=inside)
    speaks = tl.load(speculative + slot_row * stride_speculative)
    tl.store(worth + at, tl.where(column == 0, speaks, 0.0), mask=inside)
    cached = tl.load(cached_len + slot_row)
    tl.store(row_cached + row, cached)
    place = tl.arange(0, NODES)
    position = cached + place
    page = tl.load(page_table + slot_row * stride_table + position // PAGE_SIZE, mask=place < most, other=0)
    tl.store(opened + row * most + place, page * PAGE_SIZE + position % PAGE_SIZE, mask=place < most)
    tl.store(row_start + row + 1, 0)
    if row == 0:
        tl.store(row_start, 0)


@triton.jit
def _keys(worth, columns, at, total, width, size):
    """What nodes of all rows are worth, as integers of the same order: those of one row stand side by side."""
    inside = at < total
    row = at // size
    column = tl.load(columns + at - row * size, mask=inside, other=0)
    value = tl.load(worth + row.to(tl.int64) * width + column, mask=inside, other=0.0)
    return tl.where(inside, value.to(tl.int32, bitcast=True), -1)


@triton.jit(do_not_specialize=["num_rows", "width", "size", "most", "depth", "count", "num_features"])
def _open_kernel(
    columns,
    parents,
    cached_len,
    tokens,
    worth,
    above,
    feature,
    opened,
    start_before,
    row_start,
    out_slots,
    out_tokens,
    out_source,
    out_position,
    out_bits,
    new_row,
    new_which,
    new_at,
    num_rows,
    width,
    size,
    most,
    depth,
    count,
    num_features,
    BLOCK: tl.constexpr,
    NODES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a row's nodes, those that were opened before and the new ones."""
    begin(DEPENDENT)
    row = tl.program_id(0)
    total = num_rows * size
    lane = tl.arange(0, BLOCK)
    held = _keys(worth, columns, lane, total, width, size)
    least = 0  # what is opened last is worth
    for i in range(31):
        higher = least | (1 << (30 - i))
        no_less = tl.sum((held >= higher).to(tl.int32), 0)
        for start in range(BLOCK, total, BLOCK):
            key = _keys(worth, columns, start + lane, total, width, size)
            no_less += tl.sum((key >= higher).to(tl.int32), 0)
        least = tl.where(no_less >= count, higher, least)
    # how many are worth more, in all rows and in those before; and as much, in those before
    more = tl.sum((held > least).to(tl.int32), 0)
    more_before = tl.sum(((held > least) & (lane < row * size)).to(tl.int32), 0)
    like_before = tl.sum(((held == least) & (lane < row * size)).to(tl.int32), 0)
    for start in range(BLOCK, total, BLOCK):
        at = start + lane
        key = _keys(worth, columns, at, total, width, size)
        more += tl.sum((key > least).to(tl.int32), 0)
        more_before += tl.sum(((key > least) & (at < row * size)).to(tl.int32), 0)
        like_before += tl.sum(((key == least) & (at < row * size)).to(tl.int32), 0)
    first = more_before + tl.minimum(like_before, count - more)  # new ones of the rows before

    which = tl.arange(0, NODES)
    own = _keys(worth, columns, row * size + which, (row + 1) * size, width, size)
    like = own == least
    chosen = (own > least) | (like & (like_before + tl.cumsum(like.to(tl.int32), 0) <= count - more))
    rank = tl.cumsum(chosen.to(tl.int32), 0) - 1
    started = tl.load(start_before + row)
    known = tl.load(start_before + row + 1) - started
    begins = started + first
    tl.store(row_start + row, begins)
    if row == num_rows - 1:
        tl.store(row_start + num_rows, begins + known + tl.sum(chosen.to(tl.int32), 0))

    wide = row.to(tl.int64)
    column = tl.load(columns + which, mask=chosen, other=0)
    parent = tl.load(parents + which, mask=chosen, other=0)
    place = (known + rank).to(tl.int64)
    of_row = opened + wide * most
    of_kind = num_rows.to(tl.int64) * most
    slot = tl.load(of_row + place, mask=chosen, other=0)
    token = tl.load(tokens + wide * width + column, mask=chosen, other=0)
    source = tl.load(feature + wide * width + parent, mask=chosen, other=0)
    position = tl.load(cached_len + row) + depth - 1 + tl.zeros((NODES,), tl.int64)
    bits = tl.load(above + wide * width + parent, mask=chosen, other=0)
    bits |= tl.full((NODES,), 1, tl.int64) << place
    tl.store(above + wide * width + column, bits, mask=chosen)
    tl.store(feature + wide * width + column, (num_features + first + rank).to(tl.int64), mask=chosen)
    tl.store(of_row + of_kind + place, token, mask=chosen)
    tl.store(of_row + 2 * of_kind + place, source, mask=chosen)
    tl.store(of_row + 3 * of_kind + place, position, mask=chosen)
    tl.store(of_row + 4 * of_kind + place, bits, mask=chosen)
    at = begins + place
    tl.store(out_slots + at, slot, mask=chosen)
    tl.store(out_tokens + at, token, mask=chosen)
    tl.store(out_source + at, source, mask=chosen)
    tl.store(out_position + at, position, mask=chosen)
    tl.store(out_bits + at, bits, mask=chosen)
    tl.store(new_row + first + rank, tl.zeros((NODES,), tl.int64) + wide, mask=chosen)
    tl.store(new_which + first + rank, which.to(tl.int64), mask=chosen)
    tl.store(new_at + first + rank, at, mask=chosen)

    earlier = which < known
    at = begins + which
    tl.store(out_slots + at, tl.load(of_row + which, mask=earlier, other=0), mask=earlier)
    tl.store(out_tokens + at, tl.load(of_row + of_kind + which, mask=earlier, other=0), mask=earlier)
    tl.store(out_source + at, tl.load(of_row + 2 * of_kind + which, mask=earlier, other=0), mask=earlier)
    tl.store(out_position + at, tl.load(of_row + 3 * of_kind + which, mask=earlier, other=0), mask=earlier)
    tl.store(out_bits + at, tl.load(of_row + 4 * of_kind + which, mask=earlier, other=0), mask=earlier)


@triton.jit(do_not_specialize=["width", "num_ranks"])
def _offer_kernel(
    columns,
    families,
    new_row,
    new_which,
    given_tokens,
    given_chances,
    token_map,
    tokens,
    chances,
    worth,
    width,
    num_ranks,
    ROOTS: tl.constexpr,
    MAPPED: tl.constexpr,
    NODES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: the children of a node."""
    begin(DEPENDENT)
    node = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, NODES)
    inside = rank < num_ranks
    row = node
    which = node * 0
    if not ROOTS:
        row = tl.load(new_row + node)
        which = tl.load(new_which + node)
    column = tl.load(families + which * num_ranks + rank, mask=inside, other=0)
    inside &= column < width - 1  # the last column pads
    token = tl.load(given_tokens + node * num_ranks + rank, mask=inside, other=0)
    if MAPPED:
        token = tl.load(token_map + token, mask=inside, other=0)
    chance = tl.load(given_chances + node * num_ranks + rank, mask=inside, other=0.0)
    parent = tl.load(worth + row * width + tl.load(columns + which))
    at = row * width + column
    tl.store(tokens + at, token, mask=inside)
    tl.store(chances + at, chance, mask=inside)
    tl.store(worth + at, chance * parent, mask=inside)
