"""The best tokens of each row of logits, and their probabilities, in two passes and without float32 logits; and draws,
which are the best tokens of logits with noise.

A value and its column make one integer: values compare as their bits do (once those of negatives are flipped), and of
equals the earlier column's is larger. So the best of many is a maximum of integers, and all of them differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import begin, dependent
from manyheads.kernels.noise import gumbel

_LOG_BLOCK = 10
"""2^10 columns a program: one warp's, whose maximum of 32-bit integers is a single instruction."""


def topk(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best tokens, best first (of equals the earlier), and their probabilities: exp(value - logsumexp).

    A row without a finite sum (of NaN, or of nothing but -inf) has probabilities of 0.

    Args:
        logits: [N, V] float16, bfloat16 or float32; the last dimension contiguous.
        count: k, at most V.

    Returns:
        [N, k] int64 and float32.
    """
    tokens = torch.empty((logits.shape[0], count), dtype=torch.int64, device=logits.device)
    chances = torch.empty((logits.shape[0], count), dtype=torch.float32, device=logits.device)
    _launch(logits, tokens, chances)
    return tokens, chances


def argmax(logits: Tensor) -> Tensor:
    """[N, V] → [N] int64, of equals the first; -1 where what is found is not a finite number. Types as `topk`."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    _launch(logits, tokens[:, None], None)
    return tokens


def draw(
    logits: Tensor, temperature: Tensor, seed: Tensor, first: Tensor, row: Tensor, depth: Tensor, max_depth: int
) -> Tensor:
    """`Ops.draw`; the noise is made in registers."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    _launch(logits, tokens[:, None], None, (temperature, seed, first, row, depth))
    return tokens


def _launch(logits: Tensor, tokens: Tensor, chances: Tensor | None, noise: tuple[Tensor, ...] | None = None) -> None:
    rows, width = logits.shape
    count = tokens.shape[1]
    if rows == 0:
        return
    blocks = -(-width // (1 << _LOG_BLOCK))
    keys = torch.empty((rows, blocks * count), dtype=torch.int64, device=logits.device)
    # each block's maximum, and its sum of exp(value - maximum)
    stats = keys if chances is None else torch.empty((rows, 2, blocks), dtype=torch.float32, device=logits.device)
    _blocks_kernel[(rows, blocks)](
        logits,
        keys,
        stats,
        *(noise or (logits,) * 5),
        width,
        logits.stride(0),
        NOISE=noise is not None,
        COUNT=count,
        BITS=logits.element_size() * 8,
        CHANCES=chances is not None,
        LOG_BLOCK=_LOG_BLOCK,
        num_warps=1,
        **dependent(logits.device),
    )
    block_keys = triton.next_power_of_2(blocks * count)
    _merge_kernel[(rows,)](
        logits,
        keys,
        stats,
        tokens,
        tokens if chances is None else chances,
        width,
        blocks,
        logits.stride(0),
        COUNT=count,
        CHANCES=chances is not None,
        BLOCK_KEYS=block_keys,
        BLOCK_STATS=triton.next_power_of_2(blocks),
        BLOCK_COUNT=triton.next_power_of_2(count),
        num_warps=1 if block_keys <= 512 else 4,
        **dependent(logits.device),
    )


@triton.jit(do_not_specialize_on_alignment=["temperature", "seed", "first", "owner", "depth"])
def _blocks_kernel(
    logits,
    keys,
    stats,
    temperature,
    seed,
    first,
    owner,
    depth,
    width,
    stride_logits,
    NOISE: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    CHANCES: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: the best of a block of one row's columns, best first."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    BLOCK: tl.constexpr = 1 << LOG_BLOCK
    place = tl.arange(0, BLOCK)
    column = block * BLOCK + place
    inside = column < width
    MASK: tl.constexpr = (1 << (BITS - 1)) - 1
    LOWEST: tl.constexpr = -(1 << (BITS - 1)) * BLOCK  # below all numbers
    x = tl.load(logits + row * stride_logits + column, mask=inside, other=float("-inf"))
    if NOISE:
        of = tl.load(owner + row)
        heat = tl.load(temperature + of)
        if heat > 0:
            # rounded as torch does: `TorchOps.draw` draws the same
            x = tl.div_rn(x, heat) + gumbel(tl.load(seed + of), tl.load(first + of) + tl.load(depth + row), column)
    x = tl.where(x == 0, 0.0, x).to(x.dtype)  # -0 is no less
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) if BITS == 16 else x.to(tl.int32, bitcast=True).to(tl.int64)
    # an arithmetic shift: all ones for negatives
    key = (bits ^ ((bits >> (BITS - 1)) & MASK)) * BLOCK + (BLOCK - 1 - place)
    key = tl.where(inside, key, LOWEST)
    keys_at = keys + (row * blocks + block) * COUNT
    for i in range(COUNT):
        best = tl.max(key, 0)
        key = tl.where(key == best, LOWEST, key)
        best = best.to(tl.int64)
        # from (value, place) to (value, column); & and >> round down, also below 0
        best_column = block * BLOCK + BLOCK - 1 - (best & (BLOCK - 1))
        tl.store(keys_at + i, ((best >> LOG_BLOCK) << 32) + 0xFFFFFFFF - best_column)
    if CHANCES:
        x = x.to(tl.float32)
        most = tl.max(x, 0)
        # a block of -inf: -inf - -inf is NaN
        total = tl.sum(tl.exp(x - tl.where(most == float("-inf"), 0.0, most)), 0)
        tl.store(stats + row * 2 * blocks + block, most)
        tl.store(stats + (row * 2 + 1) * blocks + block, total)


@triton.jit
def _merge_kernel(
    logits,
    keys,
    stats,
    tokens,
    chances,
    width,
    blocks,
    stride_logits,
    COUNT: tl.constexpr,
    CHANCES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_STATS: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: the best of all blocks of a row."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_KEYS)
    rank = tl.arange(0, BLOCK_COUNT)
    block = tl.arange(0, BLOCK_STATS)
    LOWEST: tl.constexpr = -(1 << 63)
    key = tl.load(keys + row * blocks * COUNT + at, mask=at < blocks * COUNT, other=LOWEST)
    column = tl.zeros((BLOCK_COUNT,), tl.int64)
    for i in range(COUNT):
        best = tl.max(key, 0)
        key = tl.where(key == best, LOWEST, key)
        column = tl.where(rank == i, 0xFFFFFFFF - (best & 0xFFFFFFFF), column)
    column = tl.minimum(column, width - 1)  # there are COUNT columns, unless a NaN's bits are those of LOWEST
    value = tl.load(logits + row * stride_logits + column, mask=rank < COUNT, other=float("-inf")).to(tl.float32)
    if not CHANCES:
        column = tl.where(tl.abs(value) < float("inf"), column, -1)
    tl.store(tokens + row * COUNT + rank, column, mask=rank < COUNT)
    if CHANCES:
        most = tl.load(stats + row * 2 * blocks + block, mask=block < blocks, other=float("-inf"))
        total = tl.load(stats + (row * 2 + 1) * blocks + block, mask=block < blocks, other=0.0)
        shift = tl.max(most, 0)
        shift = tl.where(shift == float("-inf"), 0.0, shift)
        total = tl.sum(total * tl.exp(most - shift), 0)
        # never above 1: no node may be more probable than its parent
        chance = tl.minimum(tl.exp(value - shift) / total, 1.0)
        tl.store(chances + row * COUNT + rank, tl.where(total > 0, chance, 0.0), mask=rank < COUNT)
