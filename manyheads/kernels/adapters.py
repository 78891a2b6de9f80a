"""What adapters of low rank add to a product (LoRA), each token's own, many in one batch.

Tokens are put together by their adapters, in blocks of one adapter each, once for all products of a pass. Then a
product is two kernels, as in Punica (Chen et al. 2023, "SGMV") and S-LoRA (Sheng et al. 2023): down to the adapters'
rank, and up to the outputs, where the result is added. Each reads the weights of adapters that have tokens, and once
for each of their blocks. How many blocks there may be depends on the numbers of tokens and adapters alone, so that a
CUDA graph can hold it; the programs of those that are not needed end at once.

All that counts is that weights are always on their way. So all programs that go down run at once, and share the sums of
a row for that; they announce the second kernel as they begin, whose programs ask for their weights and wait. Programs
are few and have much to read each, since one that begins later waits for the memory twice, for its block and for its
weights. Sums are always made in one order, so that a row is the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import announce, begin, dependent, wait


class Tiles(NamedTuple):
    """What programs have to do."""

    size: int
    """Tokens of a block, at most."""
    splits: int
    """Programs, at most, that share the sums of a row on the way down,"""
    numbers: int
    """and numbers of the first factor that each of them multiplies at once,"""
    stages: int
    """and how many times as many it has at hand or asked for."""
    outputs: int
    """Outputs of a program on the way up."""


_FEW = 512
"""Tokens, at most, of which an adapter has a few: each block reads its weights,"""
_TILES = Tiles(8, 8, 4096, 4, 512)
"""as here;"""
_MANY = Tiles(64, 4, 4096, 3, 128)
"""and where there are more."""
_MOST_RANKS = 64
"""Numbers between the two factors that a program going down multiplies at once, at most,"""
_UP_RANKS = 16
"""and that one going up does."""
_WARPS = 4
_TOKENS_AT_ONCE = 64


def tiles_of(num_tokens: int) -> Tiles:
    """What programs have to do where there are so many tokens."""
    return _TILES if num_tokens <= _FEW else _MANY


class Blocks(NamedTuple):
    """Tokens by their adapters, in at most B blocks of `size` tokens or fewer."""

    adapter: Tensor
    """[B] int32: a block's adapter, from 1, or 0 where there is no block."""
    token: Tensor
    """[B, size] int32: its tokens, in their order, and -1 behind them; anything where there is no block."""

    @property
    def size(self) -> int:
        """Tokens of a block, at most."""
        return self.token.shape[1]


def group(which: Tensor, count: int) -> Blocks:
    """Put tokens together.

    Args:
        which: [T] int64, contiguous, each token's adapter, from 1 to `count`; 0 for none.
        count: adapters that there are.
    """
    num_tokens = which.shape[0]
    size = tiles_of(num_tokens).size
    most = min(count, num_tokens)  # so many adapters may have a block that is not full
    num_blocks = (num_tokens - most) // size + most
    adapter = torch.empty(num_blocks, dtype=torch.int32, device=which.device)
    token = torch.empty((num_blocks, size), dtype=torch.int32, device=which.device)
    _group_kernel[(-(-num_tokens // _TOKENS_AT_ONCE),)](
        which,
        adapter,
        token,
        num_tokens,
        num_blocks,
        COUNT=triton.next_power_of_2(count + 1),
        SIZE=size,
        AT_ONCE=_TOKENS_AT_ONCE,
        **dependent(which.device),
    )
    return Blocks(adapter, token)


def add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, sizes: Sequence[int], blocks: Blocks) -> None:
    """Add to a product of K projections, at most 3, what the tokens' adapters add.

    Args:
        y: [T, out], rows contiguous, in floating point; changed in place.
        x: [T, in], rows contiguous, of the weights' dtype.
        a: [N, in, K · R], contiguous.
        b: [N · R · out], of each projection [N, R, its outputs].
        sizes: outputs of each projection.
        blocks: of the tokens.

    NOTE: x and the blocks are read before the last kernel is done. That has to be one that made y, and began when they
    were written already.
    """
    if len(sizes) > 3:
        raise ValueError(f"{len(sizes)} projections in one product are more than 3")
    up(y, down(x, a, blocks), b, sizes, blocks)


def down(x: Tensor, a: Tensor, blocks: Blocks) -> Tensor:
    """x Aᵀ, of tokens that have an adapter, in parts that are to be added up: [splits, T, K · R] float32."""
    num_tokens, width = x.shape
    tiles, numbers = tiles_of(num_tokens), a.shape[2]
    ranks = min(_MOST_RANKS, max(16, triton.next_power_of_2(numbers)))
    columns = tiles.numbers // ranks
    share = -(-width // (tiles.splits * columns)) * columns
    splits = -(-width // share)
    inner = torch.empty((splits, num_tokens, numbers), dtype=torch.float32, device=x.device)
    _down_kernel[(splits, -(-numbers // ranks), len(blocks.adapter))](
        x,
        a,
        blocks.adapter,
        blocks.token,
        inner,
        num_tokens,
        width,
        x.stride(0),
        NUMBERS=numbers,
        SHARE=share,
        COLUMNS=columns,
        RANKS=ranks,
        SIZE=blocks.size,
        ROWS=max(16, blocks.size),
        num_warps=_WARPS,
        num_stages=tiles.stages,
        **dependent(x.device),
    )
    return inner


def up(y: Tensor, inner: Tensor, b: Tensor, sizes: Sequence[int], blocks: Blocks) -> None:
    """Add x Aᵀ Bᵀ to y; the kernel before it has to be `down`'s."""
    splits, num_tokens, numbers = inner.shape
    outputs, rank = tiles_of(num_tokens).outputs, numbers // len(sizes)
    _up_kernel[(sum(-(-size // outputs) for size in sizes), len(blocks.adapter))](
        inner,
        b,
        blocks.adapter,
        blocks.token,
        y,
        num_tokens,
        b.shape[0] // sum(sizes),
        *[*sizes, 0, 0][:3],
        y.stride(0),
        COUNT=len(sizes),
        RANK=rank,
        SPLITS=splits,
        OUTPUTS=outputs,
        RANKS=_UP_RANKS,
        SUMS=triton.next_power_of_2(splits),
        SIZE=blocks.size,
        num_warps=_WARPS,
        **dependent(y.device),
    )


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _group_kernel(
    which_ptr,
    adapter_ptr,
    token_ptr,
    num_tokens,
    num_blocks,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: the places of some tokens; the first one beside that: the blocks, and what is behind tokens."""
    begin(DEPENDENT)
    at, adapter = tl.arange(0, AT_ONCE), tl.arange(0, COUNT)
    token = tl.program_id(0) * AT_ONCE + at
    mine = tl.load(which_ptr + token, mask=token < num_tokens, other=0)
    before = tl.zeros((AT_ONCE,), tl.int32)
    tokens = tl.zeros((COUNT,), tl.int32)
    for start in range(0, num_tokens, AT_ONCE):
        other = start + at
        theirs = tl.load(which_ptr + other, mask=other < num_tokens, other=COUNT)
        before += tl.sum(((theirs[None, :] == mine[:, None]) & (other[None, :] < token[:, None])).to(tl.int32), 1)
        tokens += tl.sum((theirs[None, :] == adapter[:, None]).to(tl.int32), 1)
    needed = tl.where(adapter > 0, (tokens + SIZE - 1) // SIZE, 0)
    first = tl.cumsum(needed, 0) - needed
    block = tl.sum(tl.where(adapter[None, :] == mine[:, None], first[None, :], 0), 1)
    tl.store(token_ptr + block * SIZE + before, token, mask=mine > 0)
    if tl.program_id(0) == 0:
        for i in range(0, tl.max(needed, 0)):
            tl.store(adapter_ptr + first + i, adapter, mask=i < needed)
        for i in range(0, SIZE):
            tl.store(token_ptr + first * SIZE + tokens + i, -1, mask=tokens + i < needed * SIZE)
        for start in range(0, num_blocks, AT_ONCE):
            place = start + at
            tl.store(adapter_ptr + place, 0, mask=(place >= tl.sum(needed, 0)) & (place < num_blocks))


@triton.jit(do_not_specialize=["num_tokens"])
def _down_kernel(
    x_ptr,
    a_ptr,
    adapter_ptr,
    token_ptr,
    inner_ptr,
    num_tokens,
    width,
    stride_x,
    NUMBERS: tl.constexpr,
    SHARE: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: of a block of tokens one share of the columns, and some of all projections' numbers.

    Tokens are the product's M, of which tensor cores want 16.
    """
    announce(DEPENDENT)
    block = tl.program_id(2)
    adapter = tl.load(adapter_ptr + block)
    at = tl.arange(0, ROWS)
    token = tl.load(token_ptr + block * SIZE + at, mask=at < SIZE, other=-1).to(tl.int64)
    is_token = (token >= 0) & (adapter > 0)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    is_rank = rank < NUMBERS
    base = (adapter - 1).to(tl.int64) * width
    low = tl.program_id(0) * SHARE
    high = tl.where(adapter > 0, tl.minimum(low + SHARE, width), low)
    acc = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(low, high, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_column = column < width
        a_at = a_ptr + (base + column[:, None]) * NUMBERS + rank[None, :]
        a = tl.load(a_at, mask=is_column[:, None] & is_rank[None, :], other=0.0)
        x_at = x_ptr + token[:, None] * stride_x + column[None, :]
        x = tl.load(x_at, mask=is_token[:, None] & is_column[None, :], other=0.0)
        acc = tl.dot(x, a, acc, input_precision="ieee")
    wait(DEPENDENT)
    inner_at = inner_ptr + (tl.program_id(0) * num_tokens + token[:, None]) * NUMBERS + rank[None, :]
    tl.store(inner_at, acc, mask=is_token[:, None] & is_rank[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _up_kernel(
    inner_ptr,
    b_ptr,
    adapter_ptr,
    token_ptr,
    y_ptr,
    num_tokens,
    num_rows,
    first_size,
    second_size,
    third_size,
    stride_y,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANKS: tl.constexpr,
    SUMS: tl.constexpr,
    SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: some outputs of one projection of a block's tokens; `num_rows` are a projection's, N · R.

    Blocks and weights are read before the kernel waits, and what others wrote behind it.
    """
    block, piece = tl.program_id(1), tl.program_id(0)
    adapter = tl.load(adapter_ptr + block)
    token = tl.load(token_ptr + block * SIZE + tl.arange(0, SIZE)).to(tl.int64)
    is_token = (token >= 0) & (adapter > 0)
    first, second = tl.cdiv(first_size, OUTPUTS), tl.cdiv(second_size, OUTPUTS)
    is_second, is_third = piece >= first, piece >= first + second
    if COUNT < 3:
        is_third = piece < 0
    if COUNT < 2:
        is_second = piece < 0
    projection = is_second.to(tl.int32) + is_third.to(tl.int32)
    size = tl.where(is_third, third_size, tl.where(is_second, second_size, first_size))
    before = tl.where(is_second, first_size, 0) + tl.where(is_third, second_size, 0)
    piece -= tl.where(is_second, first, 0) + tl.where(is_third, second, 0)
    out = piece * OUTPUTS + tl.arange(0, OUTPUTS)
    is_out = (out < size) & (adapter > 0)
    rank = tl.arange(0, RANKS)
    row = (adapter - 1).to(tl.int64) * RANK + rank
    b_at = b_ptr + before.to(tl.int64) * num_rows + row[:, None] * size + out[None, :]
    b = tl.load(b_at, mask=(rank < RANK)[:, None] & is_out[None, :], other=0.0)
    begin(DEPENDENT)
    if adapter > 0:
        y_at = y_ptr + token[None, :] * stride_y + before + out[:, None]
        is_there = is_token[None, :] & is_out[:, None]
        y = tl.load(y_at, mask=is_there, other=0.0)
        inner_at = inner_ptr + token * (COUNT * RANK) + projection * RANK
        stride = num_tokens.to(tl.int64) * (COUNT * RANK)
        inner = _added(inner_at, is_token, rank, stride, RANK, SPLITS, SUMS)
        acc = tl.dot(tl.trans(b), tl.trans(inner.to(b.dtype)), input_precision="ieee")
        if RANK > RANKS:
            for start in range(RANKS, RANK, RANKS):
                following = start + rank
                b = tl.load(b_at + start * size, mask=(following < RANK)[:, None] & is_out[None, :], other=0.0)
                inner = _added(inner_at, is_token, following, stride, RANK, SPLITS, SUMS)
                acc = tl.dot(tl.trans(b), tl.trans(inner.to(b.dtype)), acc, input_precision="ieee")
        tl.store(y_at, (y.to(tl.float32) + acc).to(y_ptr.dtype.element_ty), mask=is_there)


@triton.jit
def _added(inner_at, is_token, rank, stride, RANK: tl.constexpr, SPLITS: tl.constexpr, SUMS: tl.constexpr):
    """Some ranks of a block's tokens, all shares of the columns added up; they are loaded at once."""
    split = tl.arange(0, SUMS)
    at = inner_at[None, :, None] + split[:, None, None] * stride + rank[None, None, :]
    is_there = is_token[None, :, None] & (split < SPLITS)[:, None, None] & (rank < RANK)[None, None, :]
    return tl.sum(tl.load(at, mask=is_there, other=0.0), 0)
