"""What adapters of low rank add to a product (LoRA), each token's own, many in one batch.

Tokens are put together by their adapters, in blocks of one adapter each, once for all products of a pass. Then what is
added to a product is one kernel. As in Punica (Chen et al. 2023, "SGMV") and S-LoRA (Sheng et al. 2023) it goes down to
the adapters' rank and up to the outputs, where the result is added; each of the two reads the weights of adapters that
have tokens, and once for each of their blocks. How many blocks there may be depends on the numbers of tokens and
adapters alone, so that a CUDA graph can hold it; the programs of those that are not needed end at once.

Some programs go down, each over a share of the columns, and say so when they are done; the others go up, load what they
need meanwhile, and wait for those of their block. So a product's weights are read in one stream, and a kernel's start
is paid for once. Sums are always made in one order, so that a row is the same in every run.
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
_FEW, _MANY = 16, 64
"""Tokens of a block at most, where there are few and where there are many;"""
_WIDTH_FEW, _WIDTH_MANY = 256, 128
"""and columns at most, or outputs, that a program multiplies at once."""
_SHARE, _MOST_SPLITS = 8192, 16
"""Where programs share the sums of a row, numbers of the first factor that each of them reads, and programs at most."""
_TILE = 4096
"""Numbers of the first factor that a program multiplies at once,"""
_MOST_RANKS = 64
"""and numbers between the two factors for which it does."""
_UP_RANKS = 16
"""Rows of the second factor that a program multiplies at once; it holds as many sums of every share in registers."""
_WARPS = 4
_STAGES = 3
_TOKENS_AT_ONCE = 64


class Blocks(NamedTuple):
    """Tokens by their adapters, in at most B blocks of `size` tokens or fewer."""

    adapter: Tensor
    """[B] int32: a block's adapter, from 1, or 0 where there is no block."""
    token: Tensor
    """[B, size] int32: its tokens, in their order, and -1 behind them; anything where there is no block."""
    done: Tensor
    """[B] int32, 0: programs of a product that are done with a block; the last one makes it 0 again."""

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
    size = _FEW if num_tokens <= _FEW_TOKENS else _MANY
    most = min(count, num_tokens)  # so many adapters may have a block that is not full
    num_blocks = (num_tokens - most) // size + most
    adapter = torch.empty(num_blocks, dtype=torch.int32, device=which.device)
    token = torch.empty((num_blocks, size), dtype=torch.int32, device=which.device)
    done = torch.empty_like(adapter)
    _group_kernel[(-(-num_tokens // _TOKENS_AT_ONCE),)](
        which,
        adapter,
        token,
        done,
        num_tokens,
        num_blocks,
        COUNT=triton.next_power_of_2(count + 1),
        SIZE=size,
        AT_ONCE=_TOKENS_AT_ONCE,
        **dependent(which.device),
    )
    return Blocks(adapter, token, done)


def add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, sizes: Sequence[int], blocks: Blocks) -> None:
    """Add to a product of K projections, at most 3, what the tokens' adapters add.

    Args:
        y: [T, out], rows contiguous, in floating point; changed in place.
        x: [T, in], rows contiguous, of the weights' dtype.
        a: [N, in, K · R], contiguous.
        b: [N · R · out], of each projection [N, R, its outputs].
        sizes: outputs of each projection.
        blocks: of the tokens.

    NOTE: x and the blocks are read before the last kernel is done. That has to be one that made y, and was launched
    when they were written already.
    """
    num_tokens, width = x.shape
    count, rank = len(sizes), a.shape[2] // len(sizes)
    if count > 3:
        raise ValueError(f"{count} projections in one product are more than 3")
    num_blocks = blocks.adapter.shape[0]
    are_few = num_tokens <= _FEW_TOKENS
    outputs = _WIDTH_FEW if are_few else _WIDTH_MANY
    ranks = min(_MOST_RANKS, max(16, triton.next_power_of_2(count * rank)))
    columns = min(outputs, _TILE // ranks)
    share = max(_SHARE // ranks, -(-width // _MOST_SPLITS)) if are_few else width
    share = -(-share // columns) * columns
    splits, tiles = -(-width // share), -(-count * rank // ranks)
    pieces = sum(-(-size // outputs) for size in sizes)
    inner = torch.empty((splits, num_tokens, count * rank), dtype=torch.float32, device=x.device)
    _kernel[(num_blocks * (splits * tiles + pieces),)](
        x,
        a,
        b,
        blocks.adapter,
        blocks.token,
        blocks.done,
        inner,
        y,
        num_tokens,
        num_blocks,
        width,
        a.shape[0] * rank,
        *[*sizes, 0, 0][:3],
        x.stride(0),
        y.stride(0),
        COUNT=count,
        RANK=rank,
        SPLITS=splits,
        TILES=tiles,
        PIECES=pieces,
        SHARE=share,
        COLUMNS=columns,
        DOWN_RANKS=ranks,
        OUTPUTS=outputs,
        UP_RANKS=_UP_RANKS,
        SUMS=triton.next_power_of_2(splits),
        SIZE=blocks.size,
        num_warps=_WARPS,
        num_stages=_STAGES,
        **dependent(x.device),
    )


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _group_kernel(
    which_ptr,
    adapter_ptr,
    token_ptr,
    done_ptr,
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
            tl.store(done_ptr + place, 0, mask=place < num_blocks)
            tl.store(adapter_ptr + place, 0, mask=(place >= tl.sum(needed, 0)) & (place < num_blocks))


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    adapter_ptr,
    token_ptr,
    done_ptr,
    inner_ptr,
    y_ptr,
    num_tokens,
    num_blocks,
    width,
    num_rows,
    first_size,
    second_size,
    third_size,
    stride_x,
    stride_y,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    PIECES: tl.constexpr,
    SHARE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOWN_RANKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    UP_RANKS: tl.constexpr,
    SUMS: tl.constexpr,
    SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a block of tokens, and of it either one share of the columns with some of all projections' numbers,
    or some outputs of one projection; `num_rows` are a projection's, N · R.

    Weights, blocks and x are read before the kernel waits for the one before it, which made y: they were there when
    that one could go on.

    NOTE: programs that go down come first and wait for no other. GPUs start programs in order, so those that wait hold
    no place that one of them still needs.
    """
    down = num_blocks * (SPLITS * TILES)
    place = tl.program_id(0)
    if place < down:
        _go_down(
            x_ptr,
            a_ptr,
            adapter_ptr,
            token_ptr,
            done_ptr,
            inner_ptr,
            place,
            num_tokens,
            width,
            stride_x,
            COUNT,
            RANK,
            SPLITS,
            TILES,
            SHARE,
            COLUMNS,
            DOWN_RANKS,
            SIZE,
            DEPENDENT,
        )
    else:
        place -= down
        _go_up(
            b_ptr,
            adapter_ptr,
            token_ptr,
            done_ptr,
            inner_ptr,
            y_ptr,
            place,
            num_tokens,
            num_rows,
            first_size,
            second_size,
            third_size,
            stride_y,
            COUNT,
            RANK,
            SPLITS,
            TILES,
            PIECES,
            OUTPUTS,
            UP_RANKS,
            SUMS,
            SIZE,
            DEPENDENT,
        )


@triton.jit
def _go_down(
    x_ptr,
    a_ptr,
    adapter_ptr,
    token_ptr,
    done_ptr,
    inner_ptr,
    place,
    num_tokens,
    width,
    stride_x,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    SHARE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOWN_RANKS: tl.constexpr,
    SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One share of the columns of a block's tokens, and some of all projections' numbers."""
    block, split = place // (SPLITS * TILES), place % (SPLITS * TILES) // TILES
    adapter = tl.load(adapter_ptr + block)
    token = tl.load(token_ptr + block * SIZE + tl.arange(0, SIZE)).to(tl.int64)
    is_token = (token >= 0) & (adapter > 0)
    rank = place % TILES * DOWN_RANKS + tl.arange(0, DOWN_RANKS)
    is_rank = rank < COUNT * RANK
    base = (adapter - 1).to(tl.int64) * width
    low = split * SHARE
    high = tl.where(adapter > 0, tl.minimum(low + SHARE, width), low)
    acc = tl.zeros((SIZE, DOWN_RANKS), tl.float32)
    for start in range(low, high, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_column = column < width
        x_at = x_ptr + token[:, None] * stride_x + column[None, :]
        x = tl.load(x_at, mask=is_token[:, None] & is_column[None, :], other=0.0)
        a_at = a_ptr + (base + column[:, None]) * (COUNT * RANK) + rank[None, :]
        a = tl.load(a_at, mask=is_column[:, None] & is_rank[None, :], other=0.0)
        acc = tl.dot(x, a, acc, input_precision="ieee")
    begin(DEPENDENT)
    inner_at = inner_ptr + (split * num_tokens + token[:, None]) * (COUNT * RANK) + rank[None, :]
    tl.store(inner_at, acc, mask=is_token[:, None] & is_rank[None, :])
    if adapter > 0:
        tl.debug_barrier()
        tl.atomic_add(done_ptr + block, 1, sem="release", scope="gpu")


@triton.jit
def _go_up(
    b_ptr,
    adapter_ptr,
    token_ptr,
    done_ptr,
    inner_ptr,
    y_ptr,
    place,
    num_tokens,
    num_rows,
    first_size,
    second_size,
    third_size,
    stride_y,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    PIECES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    UP_RANKS: tl.constexpr,
    SUMS: tl.constexpr,
    SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Some outputs of one projection of a block's tokens."""
    down: tl.constexpr = SPLITS * TILES
    block, piece = place // PIECES, place % PIECES
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
    is_there = is_token[:, None] & is_out[None, :]
    rank = tl.arange(0, UP_RANKS)
    row = (adapter - 1).to(tl.int64) * RANK + rank
    b_at = b_ptr + before.to(tl.int64) * num_rows + row[:, None] * size + out[None, :]
    b = tl.load(b_at, mask=(rank < RANK)[:, None] & is_out[None, :], other=0.0)
    begin(DEPENDENT)
    if adapter > 0:
        y_at = y_ptr + token[:, None] * stride_y + before + out[None, :]
        y = tl.load(y_at, mask=is_there, other=0.0)
        while tl.atomic_add(done_ptr + block, 0, sem="acquire", scope="gpu") < down:
            pass
        inner_at = inner_ptr + token * (COUNT * RANK) + projection * RANK
        stride = num_tokens.to(tl.int64) * (COUNT * RANK)
        inner = _added(inner_at, is_token, rank, stride, RANK, SPLITS, SUMS)
        acc = tl.dot(inner.to(b.dtype), b, input_precision="ieee")
        if RANK > UP_RANKS:
            for start in range(UP_RANKS, RANK, UP_RANKS):
                following = start + rank
                b = tl.load(b_at + start * size, mask=(following < RANK)[:, None] & is_out[None, :], other=0.0)
                inner = _added(inner_at, is_token, following, stride, RANK, SPLITS, SUMS)
                acc = tl.dot(inner.to(b.dtype), b, acc, input_precision="ieee")
        tl.store(y_at, (y.to(tl.float32) + acc).to(y_ptr.dtype.element_ty), mask=is_there)
        # NOTE: whoever comes last has to find that nobody waits any more
        if tl.atomic_add(done_ptr + block, 1, sem="relaxed", scope="gpu") == down + PIECES - 1:
            tl.store(done_ptr + block, 0)


@triton.jit
def _added(inner_at, is_token, rank, stride, RANK: tl.constexpr, SPLITS: tl.constexpr, SUMS: tl.constexpr):
    """Some ranks of a block's tokens, all shares of the columns added up; they are loaded at once."""
    split = tl.arange(0, SUMS)
    at = inner_at[None, :, None] + split[:, None, None] * stride + rank[None, None, :]
    is_there = is_token[None, :, None] & (split < SPLITS)[:, None, None] & (rank < RANK)[None, None, :]
    return tl.sum(tl.load(at, mask=is_there, other=0.0), 0)
