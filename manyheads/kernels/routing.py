"""Which experts a token goes to, and tokens put together by their experts, for the products of experts.py.

A router chooses K experts for each token. Each of these pairs of a token and an expert is a row of the products. They
are put together in blocks of one expert each, once for all products of a layer. How many blocks there may be depends on
the numbers of pairs and experts alone, so that a CUDA graph can hold it; those that are not needed are said to be none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import begin, dependent

_TOKENS_A_PROGRAM = 16
"""Of the router, whatever their number, so that a token's chances do not depend on it."""
_PAIRS_AT_ONCE = ((128, 4), (1024, 4), (4096, 8))
"""What a program looks at at once, and its warps: the first that holds all pairs, else the last."""
_MOST_PAIRS = 128
"""In a block; tensor cores are busy with as many."""
_RECORDED_TOKENS = 1024
"""Beyond so many, blocks are as for so many: steps with more are not all run before traffic comes."""


class Groups(NamedTuple):
    """T · K pairs of a token and one of its experts, in at most B blocks of one expert; pair t · K + k is token t's."""

    order: Tensor
    """[T · K] int32, the pairs by their experts."""
    table: Tensor
    """[3, B] int32: a block's expert, or -1 where there is no block; and in `order`, where its pairs begin and where
    its expert's end."""
    size: int
    """Most pairs of a block."""
    top: int
    """K."""


def route(x: Tensor, router: Tensor, bias: Tensor | None, top: int, adds_up: bool) -> tuple[Tensor, Tensor]:
    """Choose experts: the most probable ones, by the softmax of x · routerᵀ + bias in float32.

    Args:
        x: [T, hidden], contiguous.
        router: [experts, hidden], contiguous.
        bias: [experts] or None.
        top: K.
        adds_up: whether the chances of those that are chosen are made to add up to 1.

    Returns:
        [T, K] float32, their chances, the best first; [T, K] int32, which they are.
    """
    num_tokens, width = x.shape
    chances = torch.empty((num_tokens, top), dtype=torch.float32, device=x.device)
    chosen = torch.empty((num_tokens, top), dtype=torch.int32, device=x.device)
    _route_kernel[(-(-num_tokens // _TOKENS_A_PROGRAM),)](
        x,
        router,
        router if bias is None else bias,  # without one it is never read
        chances,
        chosen,
        num_tokens,
        width,
        COUNT=len(router),
        TOP=top,
        ADDS_UP=adds_up,
        HAS_BIAS=bias is not None,
        EXPERTS=max(16, triton.next_power_of_2(len(router))),
        RANKS=triton.next_power_of_2(top),
        TOKENS=_TOKENS_A_PROGRAM,
        COLUMNS=128 if x.itemsize == 2 else 64,
        num_warps=4,
        num_stages=3,
        **dependent(x.device),
    )
    return chances, chosen


def group(chosen: Tensor, count: int) -> Groups:
    """Put pairs together.

    Args:
        chosen: [T, K] int32, contiguous, each token's experts.
        count: experts that there are.
    """
    num_tokens, top = chosen.shape
    num_pairs = num_tokens * top
    size = block_size(num_tokens, top, count)
    most = min(count, num_pairs)  # so many experts may have a block that is not full
    num_blocks = (num_pairs - most) // size + most
    order = torch.empty(num_pairs, dtype=torch.int32, device=chosen.device)
    table = torch.empty((3, num_blocks), dtype=torch.int32, device=chosen.device)
    at_once, warps = next((many for many in _PAIRS_AT_ONCE if many[0] >= num_pairs), _PAIRS_AT_ONCE[-1])
    _group_kernel[(count,)](
        chosen,
        order,
        table,
        num_pairs,
        num_blocks,
        COUNT=count,
        BINS=triton.next_power_of_2(count + 1),
        SIZE=size,
        AT_ONCE=at_once,
        num_warps=warps,
        **dependent(chosen.device),
    )
    return Groups(order, table, size, top)


def block_size(num_tokens: int, top: int, count: int) -> int:
    """Pairs of a block: half as many again as an expert has, since some have more."""
    size, usual = 16, 3 * min(num_tokens, _RECORDED_TOKENS) * top // (2 * count)
    while size < min(usual, _MOST_PAIRS):
        size *= 2
    return size


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    x_ptr,
    router_ptr,
    bias_ptr,
    chances_ptr,
    chosen_ptr,
    num_tokens,
    width,
    COUNT: tl.constexpr,
    TOP: tl.constexpr,
    ADDS_UP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: some tokens, all experts."""
    begin(DEPENDENT)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    is_token, is_expert = token < num_tokens, expert < COUNT
    acc = tl.zeros((EXPERTS, TOKENS), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_column = (column < width)[None, :]
        router_at = router_ptr + expert[:, None] * width + column[None, :]
        router = tl.load(router_at, mask=is_expert[:, None] & is_column, other=0.0)
        x_at = x_ptr + token[:, None].to(tl.int64) * width + column[None, :]
        x = tl.load(x_at, mask=is_token[:, None] & is_column, other=0.0)
        acc = tl.dot(router, tl.trans(x), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert, mask=is_expert, other=0.0).to(tl.float32)[:, None]
    left = tl.where(is_expert[:, None], acc, float("-inf"))
    most = tl.max(left, 0)
    total = tl.sum(tl.exp(left - most[None, :]), 0)
    rank = tl.arange(0, RANKS)[None, :]
    chances = tl.zeros((TOKENS, RANKS), tl.float32)
    chosen = tl.zeros((TOKENS, RANKS), tl.int32)
    for k in tl.static_range(TOP):
        # what is not a number has a place among the experts all the same
        best = tl.minimum(tl.argmax(left, 0), COUNT - 1)
        chances = tl.where(rank == k, tl.exp(tl.max(left, 0) - most)[:, None], chances)
        chosen = tl.where(rank == k, best[:, None], chosen)
        left = tl.where(expert[:, None] == best[None, :], float("-inf"), left)
    if ADDS_UP:
        total = tl.sum(chances, 1)
    at = token[:, None] * TOP + rank
    is_there = is_token[:, None] & (rank < TOP)
    tl.store(chances_ptr + at, chances / total[:, None], mask=is_there)
    tl.store(chosen_ptr + at, chosen, mask=is_there)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _group_kernel(
    chosen_ptr,
    order_ptr,
    table_ptr,
    num_pairs,
    num_blocks,
    COUNT: tl.constexpr,
    BINS: tl.constexpr,
    SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: the blocks of an expert, and the places of its pairs."""
    begin(DEPENDENT)
    mine = tl.program_id(0)
    at, expert = tl.arange(0, AT_ONCE), tl.arange(0, BINS)
    pairs = tl.zeros((BINS,), tl.int32)
    for start in range(0, num_pairs, AT_ONCE):
        pair = start + at
        chosen = tl.load(chosen_ptr + pair, mask=pair < num_pairs, other=COUNT)
        pairs += tl.histogram(chosen, BINS)
    needed = tl.where(expert < COUNT, (pairs + SIZE - 1) // SIZE, 0)
    first = tl.sum(tl.where(expert < mine, pairs, 0), 0)
    count = tl.sum(tl.where(expert == mine, pairs, 0), 0)
    block = table_ptr + tl.sum(tl.where(expert < mine, needed, 0), 0)
    for i in range(0, tl.cdiv(count, SIZE)):
        tl.store(block + i, mine)
        tl.store(block + num_blocks + i, first + i * SIZE)
        tl.store(block + 2 * num_blocks + i, first + count)
    if mine == 0:
        used = tl.sum(needed, 0)
        for start in range(0, num_blocks, AT_ONCE):
            place = start + at
            tl.store(table_ptr + place, -1, mask=(place >= used) & (place < num_blocks))
    for start in range(0, num_pairs, AT_ONCE):
        pair = start + at
        is_mine = tl.load(chosen_ptr + pair, mask=pair < num_pairs, other=COUNT) == mine
        place = first + tl.cumsum(is_mine.to(tl.int32), 0) - 1
        tl.store(order_ptr + place, pair, mask=is_mine)
        first += tl.sum(is_mine.to(tl.int32), 0)
