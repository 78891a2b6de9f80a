"""Which of a row's logits top-k, top-p and min-p leave, without sorting them: the least of those is searched for.

A float's bits are an integer that compares as it does (once those of negatives are flipped). So the value lies between
two of 2^32 integers, and each pass over the row, which stays in the cache, leaves an eighth of what is between them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import begin, dependent

_BLOCK = 4096
_WAYS, _PASSES = 8, 11
"""8^11 is more than 2^32."""


def cutoff(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """`Ops.cutoff`."""
    rows, width = logits.shape
    found = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _cutoff_kernel[(rows,)](
            logits,
            top_k,
            top_p,
            min_p,
            found,
            width,
            logits.stride(0),
            BLOCK=_BLOCK,
            WAYS=_WAYS,
            PASSES=_PASSES,
            num_warps=16,
            **dependent(logits.device),
        )
    return found


@triton.jit
def _cutoff_kernel(
    logits,
    top_k,
    top_p,
    min_p,
    found,
    width,
    stride_logits,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
    PASSES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a row."""
    begin(DEPENDENT)
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride_logits
    count, share, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    order = tl.arange(0, BLOCK)
    most = tl.full((), float("-inf"), tl.float32)
    for start in range(0, width, BLOCK):
        x = tl.load(logits + start + order, mask=start + order < width, other=float("-inf"))
        most = tl.maximum(most, tl.max(x, axis=0))
    cut = tl.full((), float("-inf"), tl.float32)
    way = tl.arange(0, WAYS)
    if count < width:  # the largest value that so many reach
        low, high = tl.full((), -(1 << 31), tl.int64), tl.full((), 1 << 31, tl.int64)
        for _ in range(PASSES):
            bounds = _part(low, high, way, WAYS).to(tl.int32)
            reaching = tl.zeros((BLOCK, WAYS), tl.int32)
            for start in range(0, width, BLOCK):
                there = start + order < width
                key = _key(tl.load(logits + start + order, mask=there, other=0.0))
                reaching += (there[:, None] & (key[:, None] >= bounds[None, :])).to(tl.int32)
            low, high = _narrowed(low, high, tl.sum(reaching, axis=0) >= count, way, WAYS)
        cut = _value(low)
    if share < 1.0:  # the least value above which there is less than that share of what is left
        weights = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            x = tl.load(logits + start + order, mask=start + order < width, other=float("-inf"))
            weights += tl.where(x >= cut, tl.exp(x - most), 0.0)
        enough = share * tl.sum(weights, axis=0)
        low, high = tl.full((), -(1 << 31), tl.int64), _key(most).to(tl.int64)
        for _ in range(PASSES):
            bounds = _part(low, high, way, WAYS).to(tl.int32)
            above = tl.zeros((BLOCK, WAYS), tl.float32)
            for start in range(0, width, BLOCK):
                x = tl.load(logits + start + order, mask=start + order < width, other=float("-inf"))
                weight = tl.where(x >= cut, tl.exp(x - most), 0.0)
                above += tl.where(_key(x)[:, None] > bounds[None, :], weight[:, None], 0.0)
            low, high = _narrowed(low, high, tl.sum(above, axis=0) >= enough, way, WAYS)
        cut = tl.maximum(cut, _value(high))
    if least > 0.0:
        cut = tl.maximum(cut, most + tl.log(least))
    tl.store(found + row, tl.minimum(cut, most))


@triton.jit
def _part(low, high, number, WAYS: tl.constexpr):
    """Where a part of what is between two bounds begins, of as many as there are ways."""
    return low + (high - low) * number // WAYS


@triton.jit
def _narrowed(low, high, holds, way, WAYS: tl.constexpr):
    """The part between the last bound for which something holds, and the next one; for the lowest it does.

    holds, way [WAYS].
    """
    last = tl.sum((holds & (way > 0)).to(tl.int64), axis=0)
    return _part(low, high, last, WAYS), _part(low, high, last + 1, WAYS)


@triton.jit
def _key(x):
    """An integer that compares as a float32 does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 of such an integer."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
