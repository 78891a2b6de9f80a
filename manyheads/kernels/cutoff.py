"""Which of a row's logits top-k, top-p and min-p leave, without sorting them: the least of those is searched for.

A float's bits are an integer that compares as it does (once those of negatives are flipped). So the value lies between
two of 2^32 integers, and each pass over logits leaves an eighth of what is between them.

Passes over a whole row would take long, and few of its logits can be left. Of a row that is much longer than what is
looked at at once, the greatest at each place of a block are searched first: what so many of them reach, at least so
many of the row do. Only what reaches that is searched then, where it is no more than a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import begin, dependent

_BLOCK, _SMALL = 4096, 1024
"""Logits that are looked at at once, of a row and of what may be left of it."""
_LONG = 4
"""Blocks of a row from which on the search for those that may be left is worth its time."""
_WAYS, _PASSES = 8, 11
"""8^11 is more than 2^32."""
_LOWEST = tl.constexpr(-2139095041)
"""The integer of -inf."""


def cutoff(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """`Ops.cutoff`."""
    rows, width = logits.shape
    found = torch.empty(rows, dtype=torch.float32, device=logits.device)
    narrows = width >= _LONG * _BLOCK
    room = torch.empty((rows, _BLOCK) if narrows else 1, dtype=torch.float32, device=logits.device)
    if rows:
        _cutoff_kernel[(rows,)](
            logits,
            top_k,
            top_p,
            min_p,
            room,
            found,
            width,
            logits.stride(0),
            BLOCK=_BLOCK,
            SMALL=_SMALL,
            WAYS=_WAYS,
            PASSES=_PASSES,
            NARROWS=narrows,
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
    room,
    found,
    width,
    stride_logits,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
    WAYS: tl.constexpr,
    PASSES: tl.constexpr,
    NARROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a row; room [rows, BLOCK] is its own."""
    begin(DEPENDENT)
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride_logits
    count, share, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    order = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, width, BLOCK):
        x = tl.load(logits + start + order, mask=start + order < width, other=float("-inf"))
        peaks = tl.maximum(peaks, x)
    most = tl.max(peaks, axis=0)
    cut = tl.full((), float("-inf"), tl.float32)
    if (count < width) | (share < 1.0):
        mass = tl.full((), 0.0, tl.float32)
        if count >= width:
            mass = _mass(logits, width, cut, most, BLOCK)
        num_left = width
        if NARROWS:
            room += row.to(tl.int64) * BLOCK
            tl.store(room + order, peaks)
            tl.debug_barrier()
            low = cut
            if count < width:
                if count < BLOCK:
                    low = _greatest(room, BLOCK, count, BLOCK, WAYS, PASSES)
            else:
                # a little more than needed, whatever sums are rounded to; and all the others have less than is left out
                low = _heaviest(room, BLOCK, cut, most, share * mass * 1.0001, BLOCK, WAYS, PASSES)
                low = tl.maximum(low, most + tl.log((1.0 - share) * 0.5 * mass / width))
            tl.debug_barrier()
            num_left = 0
            for start in range(0, width, BLOCK):
                x = tl.load(logits + start + order, mask=start + order < width, other=float("-inf"))
                is_left = ((x >= low) & (x > float("-inf"))).to(tl.int32)
                place = num_left + tl.cumsum(is_left, axis=0) - 1
                tl.store(room + place, x, mask=(is_left != 0) & (place < BLOCK))
                num_left += tl.sum(is_left, axis=0)
            tl.debug_barrier()
        if NARROWS and num_left <= BLOCK:
            cut = _search(room, num_left, count, count < width, share, mass, most, SMALL, WAYS, PASSES)
            cut = tl.maximum(cut, low)
        else:
            cut = _search(logits, width, count, count < width, share, mass, most, BLOCK, WAYS, PASSES)
    if least > 0.0:
        cut = tl.maximum(cut, most + tl.log(least))
    tl.store(found + row, tl.minimum(cut, most))


@triton.jit
def _search(
    values, num, count, has_count, share, mass, most, BLOCK: tl.constexpr, WAYS: tl.constexpr, PASSES: tl.constexpr
):
    """What top-k, and of what that leaves top-p, leave of so many values; mass: of all, if there is no top-k."""
    cut = tl.full((), float("-inf"), tl.float32)
    if has_count & (count <= num):
        cut = _greatest(values, num, count, BLOCK, WAYS, PASSES)
    if share < 1.0:
        if has_count:
            mass = _mass(values, num, cut, most, BLOCK)
        cut = tl.maximum(cut, _heaviest(values, num, cut, most, share * mass, BLOCK, WAYS, PASSES))
    return cut


@triton.jit
def _mass(values, num, cut, most, BLOCK: tl.constexpr):
    """The sum of exp(x - most) over those from a cut on."""
    order = tl.arange(0, BLOCK)
    weights = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num, BLOCK):
        x = tl.load(values + start + order, mask=start + order < num, other=float("-inf"))
        weights += tl.where(x >= cut, tl.exp(x - most), 0.0)
    return tl.sum(weights, axis=0)


@triton.jit
def _greatest(values, num, count, BLOCK: tl.constexpr, WAYS: tl.constexpr, PASSES: tl.constexpr):
    """The largest value that `count` of them reach, of so many at least."""
    order, way = tl.arange(0, BLOCK), tl.arange(0, WAYS)
    low, high = tl.full((), _LOWEST, tl.int64), tl.full((), 1 << 31, tl.int64)
    for _ in range(PASSES):
        bounds = _part(low, high, way, WAYS).to(tl.int32)
        reaching = tl.zeros((BLOCK, WAYS), tl.int32)
        for start in range(0, num, BLOCK):
            there = start + order < num
            key = _key(tl.load(values + start + order, mask=there, other=0.0))
            reaching += (there[:, None] & (key[:, None] >= bounds[None, :])).to(tl.int32)
        low, high = _narrowed(low, high, tl.sum(reaching, axis=0) >= count, way, WAYS)
    return _value(low)


@triton.jit
def _heaviest(values, num, cut, most, enough, BLOCK: tl.constexpr, WAYS: tl.constexpr, PASSES: tl.constexpr):
    """The least value above which those from a cut on have less than so much mass; -inf where all have less."""
    order, way = tl.arange(0, BLOCK), tl.arange(0, WAYS)
    low, high = tl.full((), _LOWEST - 1, tl.int64), _key(most).to(tl.int64)
    for _ in range(PASSES):
        bounds = _part(low, high, way, WAYS).to(tl.int32)
        above = tl.zeros((BLOCK, WAYS), tl.float32)
        for start in range(0, num, BLOCK):
            x = tl.load(values + start + order, mask=start + order < num, other=float("-inf"))
            weight = tl.where(x >= cut, tl.exp(x - most), 0.0)
            above += tl.where(_key(x)[:, None] > bounds[None, :], weight[:, None], 0.0)
        low, high = _narrowed(low, high, tl.sum(above, axis=0) >= enough, way, WAYS)
    return _value(tl.maximum(high, _LOWEST))


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
