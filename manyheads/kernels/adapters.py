"""What adapters of low rank add to a product (LoRA), each token's own, many in one batch.

Tokens are put together by their adapters, in blocks of one adapter each, once for all products of a pass. Then a
product is two kernels, as in Punica (Chen et al. 2023, "SGMV") and S-LoRA (Sheng et al. 2023): down to the adapters'
rank, and up to the outputs, where the result is added. Each reads the weights of adapters that have tokens, and once
for each of their blocks. How many blocks there may be depends on the numbers of tokens and adapters alone, so that a
CUDA graph can hold it; those that are not needed end at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import begin, dependent

_FEW_TOKENS = 512
"""Of so many, blocks are small, since an adapter has few of them; and programs share the sums of a row."""
_SPLITS = 4
_STAGES = 2
_TOKENS_AT_ONCE = 64
_COLUMNS = 128
_OUTPUTS = 128
_MOST_RANKS = 64
"""A program has so many numbers between the two factors at once."""


class Blocks(NamedTuple):
    """T tokens by their adapters, in at most B blocks of `size` tokens or fewer."""

    order: Tensor
    """[T] int32, the tokens by their adapters."""
    table: Tensor
    """[3, B] int32: a block's adapter, from 1, or 0 where there is no block; and in `order`, where its tokens begin and
    where its adapter's end."""
    size: int


def group(which: Tensor, count: int) -> Blocks:
    """Put tokens together.

    Args:
        which: [T] int64, contiguous, each token's adapter, from 1 to `count`; 0 for none.
        count: adapters that there are.
    """
    num_tokens = which.shape[0]
    size = 16 if num_tokens <= _FEW_TOKENS else 64
    num_blocks = -(-num_tokens // size) + min(count, num_tokens)
    order = torch.empty(num_tokens, dtype=torch.int32, device=which.device)
    table = torch.empty((3, num_blocks), dtype=torch.int32, device=which.device)
    _group_kernel[(-(-num_tokens // _TOKENS_AT_ONCE) + 1,)](
        which,
        order,
        table,
        num_tokens,
        num_blocks,
        COUNT=triton.next_power_of_2(count + 1),
        SIZE=size,
        AT_ONCE=_TOKENS_AT_ONCE,
        **dependent(which.device),
    )
    return Blocks(order, table, size)


def add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, sizes: Sequence[int], blocks: Blocks) -> None:
    """Add to a product of K projections, at most 3, what the tokens' adapters add.

    Args:
        y: [T, out], rows contiguous, in floating point; changed in place.
        x: [T, in], rows contiguous, of the weights' dtype.
        a: [N, in, K · R], contiguous.
        b: [N · R · out], of each projection [N, R, its outputs].
        sizes: outputs of each projection.
        blocks: of the tokens.
    """
    num_tokens, width = x.shape
    count, rank = len(sizes), a.shape[2] // len(sizes)
    if count > 3:
        raise ValueError(f"{count} projections in one product are more than 3")
    num_blocks, splits = blocks.table.shape[1], _SPLITS if num_tokens <= _FEW_TOKENS else 1
    share = -(-width // (splits * _COLUMNS)) * _COLUMNS
    inner = torch.empty((splits, num_tokens, count * rank), dtype=torch.float32, device=x.device)
    ranks = min(_MOST_RANKS, max(16, triton.next_power_of_2(count * rank)))
    _down_kernel[(num_blocks, splits, -(-count * rank // ranks))](
        x,
        a,
        blocks.order,
        blocks.table,
        inner,
        num_tokens,
        num_blocks,
        width,
        share,
        x.stride(0),
        RANK=count * rank,
        RANKS=ranks,
        SIZE=blocks.size,
        COLUMNS=_COLUMNS,
        num_warps=4,
        num_stages=_STAGES,
        **dependent(x.device),
    )
    _up_kernel[(num_blocks, sum(-(-size // _OUTPUTS) for size in sizes))](
        inner,
        b,
        blocks.order,
        blocks.table,
        y,
        num_tokens,
        num_blocks,
        a.shape[0] * rank,
        *[*sizes, 0, 0][:3],
        y.stride(0),
        COUNT=count,
        SPLITS=splits,
        RANK=rank,
        RANKS=min(_MOST_RANKS, max(16, triton.next_power_of_2(rank))),
        SIZE=blocks.size,
        OUTPUTS=_OUTPUTS,
        num_warps=4,
        num_stages=_STAGES,
        **dependent(x.device),
    )


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _group_kernel(
    which_ptr,
    order_ptr,
    table_ptr,
    num_tokens,
    num_blocks,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: the places of some tokens; the last one: all blocks."""
    begin(DEPENDENT)
    at = tl.arange(0, AT_ONCE)
    if tl.program_id(0) < tl.num_programs(0) - 1:
        token = tl.program_id(0) * AT_ONCE + at
        mine = tl.load(which_ptr + token, mask=token < num_tokens, other=0)
        place = tl.zeros((AT_ONCE,), tl.int32)
        for start in range(0, num_tokens, AT_ONCE):
            other = start + at
            theirs = tl.load(which_ptr + other, mask=other < num_tokens, other=COUNT)
            is_alike_before = (theirs[None, :] == mine[:, None]) & (other[None, :] < token[:, None])
            place += tl.sum(((theirs[None, :] < mine[:, None]) | is_alike_before).to(tl.int32), 1)
        tl.store(order_ptr + place, token, mask=token < num_tokens)
    else:
        adapter = tl.arange(0, COUNT)
        tokens = tl.zeros((COUNT,), tl.int32)
        for start in range(0, num_tokens, AT_ONCE):
            other = start + at
            theirs = tl.load(which_ptr + other, mask=other < num_tokens, other=COUNT)
            tokens += tl.sum((theirs[None, :] == adapter[:, None]).to(tl.int32), 1)
        last = tl.cumsum(tokens, 0)
        needed = tl.where(adapter > 0, (tokens + SIZE - 1) // SIZE, 0)
        behind = tl.cumsum(needed, 0)
        for i in range(0, tl.max(needed, 0)):
            is_there = i < needed
            block = table_ptr + behind - needed + i
            tl.store(block, adapter, mask=is_there)
            tl.store(block + num_blocks, last - tokens + i * SIZE, mask=is_there)
            tl.store(block + 2 * num_blocks, last, mask=is_there)
        for start in range(0, num_blocks, AT_ONCE):
            place = start + at
            tl.store(table_ptr + place, 0, mask=(place >= tl.sum(needed, 0)) & (place < num_blocks))


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _down_kernel(
    x_ptr,
    a_ptr,
    order_ptr,
    table_ptr,
    inner_ptr,
    num_tokens,
    num_blocks,
    width,
    share,
    stride_x,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a block of tokens, one share of the columns, some of all projections' numbers."""
    begin(DEPENDENT)
    block = tl.program_id(0)
    adapter = tl.load(table_ptr + block)
    if adapter > 0:
        at = tl.load(table_ptr + num_blocks + block) + tl.arange(0, SIZE)
        is_token = at < tl.load(table_ptr + 2 * num_blocks + block)
        token = tl.load(order_ptr + at, mask=is_token, other=0).to(tl.int64)
        rank = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
        is_rank = rank < RANK
        low = tl.program_id(1) * share
        base = (adapter - 1).to(tl.int64) * width
        acc = tl.zeros((SIZE, RANKS), tl.float32)
        for start in range(low, tl.minimum(low + share, width), COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            is_column = column < width
            x_at = x_ptr + token[:, None] * stride_x + column[None, :]
            x = tl.load(x_at, mask=is_token[:, None] & is_column[None, :], other=0.0)
            a_at = a_ptr + (base + column[:, None]) * RANK + rank[None, :]
            a = tl.load(a_at, mask=is_column[:, None] & is_rank[None, :], other=0.0)
            acc = tl.dot(x, a, acc, input_precision="ieee")
        inner_at = inner_ptr + (tl.program_id(1) * num_tokens + at[:, None]).to(tl.int64) * RANK + rank[None, :]
        tl.store(inner_at, acc, mask=is_token[:, None] & is_rank[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _up_kernel(
    inner_ptr,
    b_ptr,
    order_ptr,
    table_ptr,
    y_ptr,
    num_tokens,
    num_blocks,
    num_rows,
    first_size,
    second_size,
    third_size,
    stride_y,
    COUNT: tl.constexpr,
    SPLITS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    SIZE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a block of tokens, and some outputs of one projection; `num_rows` are a projection's, N · R."""
    begin(DEPENDENT)
    block = tl.program_id(0)
    adapter = tl.load(table_ptr + block)
    if adapter > 0:
        piece = tl.program_id(1)
        first, second = tl.cdiv(first_size, OUTPUTS), tl.cdiv(second_size, OUTPUTS)
        is_second, is_third = piece >= first, piece >= first + second
        if COUNT < 3:
            is_third = piece < 0
        if COUNT < 2:
            is_second = piece < 0
        projection = is_second.to(tl.int32) + is_third.to(tl.int32)
        size = tl.where(is_third, third_size, tl.where(is_second, second_size, first_size))
        low = tl.where(is_second, first_size, 0) + tl.where(is_third, second_size, 0)
        piece -= tl.where(is_second, first, 0) + tl.where(is_third, second, 0)
        at = tl.load(table_ptr + num_blocks + block) + tl.arange(0, SIZE)
        is_token = at < tl.load(table_ptr + 2 * num_blocks + block)
        token = tl.load(order_ptr + at, mask=is_token, other=0).to(tl.int64)
        out = piece * OUTPUTS + tl.arange(0, OUTPUTS)
        is_out = out < size
        y_at = y_ptr + token[:, None] * stride_y + low + out[None, :]
        is_there = is_token[:, None] & is_out[None, :]
        y = tl.load(y_at, mask=is_there, other=0.0).to(tl.float32)
        base = b_ptr + low.to(tl.int64) * num_rows
        for start in range(0, RANK, RANKS):
            rank = start + tl.arange(0, RANKS)
            is_rank = rank < RANK
            inner = tl.zeros((SIZE, RANKS), tl.float32)
            for split in range(0, SPLITS):
                row = (split * num_tokens + at[:, None]).to(tl.int64) * (COUNT * RANK) + projection * RANK
                inner += tl.load(inner_ptr + row + rank[None, :], mask=is_token[:, None] & is_rank[None, :], other=0.0)
            b_at = base + ((adapter - 1).to(tl.int64) * RANK + rank[:, None]) * size + out[None, :]
            b = tl.load(b_at, mask=is_rank[:, None] & is_out[None, :], other=0.0)
            y = tl.dot(inner.to(b.dtype), b, y, input_precision="ieee")
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=is_there)
