"""Which of a row's logits top-k, top-p and min-p leave, without sorting them: the least of those is searched for.

A float's bits are an integer that compares as it does (once those of negatives are flipped), so 32 halvings find any
value. Each is a pass over the row, which stays in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import begin, dependent

_BLOCK = 4096


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
            num_warps=8,
            **dependent(logits.device),
        )
    return found


@triton.jit
def _cutoff_kernel(
    logits, top_k, top_p, min_p, found, width, stride_logits, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
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
    if count < width:  # the largest value that so many reach
        low, high = tl.full((), -(1 << 31), tl.int64), tl.full((), 1 << 31, tl.int64)
        for _ in range(32):
            middle = (low + high) >> 1
            reach = tl.full((), 0, tl.int32)
            for start in range(0, width, BLOCK):
                there = start + order < width
                x = tl.load(logits + start + order, mask=there, other=0.0)
                reach += tl.sum((there & (_key(x) >= middle)).to(tl.int32), axis=0)
            low = tl.where(reach >= count, middle, low)
            high = tl.where(reach >= count, high, middle)
        cut = _value(low)
    if share < 1.0:  # the least value above which there is less than that share of what is left
        mass = tl.full((), 0.0, tl.float32)
        for start in range(0, width, BLOCK):
            x = tl.load(logits + start + order, mask=start + order < width, other=float("-inf"))
            mass += tl.sum(tl.where(x >= cut, tl.exp(x - most), 0.0), axis=0)
        low, high = tl.full((), -(1 << 31) - 1, tl.int64), _key(most).to(tl.int64)
        for _ in range(32):
            middle = (low + high) >> 1
            above = tl.full((), 0.0, tl.float32)
            for start in range(0, width, BLOCK):
                x = tl.load(logits + start + order, mask=start + order < width, other=float("-inf"))
                above += tl.sum(tl.where((_key(x) > middle) & (x >= cut), tl.exp(x - most), 0.0), axis=0)
            low = tl.where(above < share * mass, low, middle)
            high = tl.where(above < share * mass, middle, high)
        cut = tl.maximum(cut, _value(high))
    if least > 0.0:
        cut = tl.maximum(cut, most + tl.log(least))
    tl.store(found + row, tl.minimum(cut, most))


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
