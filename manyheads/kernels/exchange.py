"""Sums over ranks in one kernel: each writes its rows straight into the others' memory, and adds up what it is sent.

A library's all-reduce is made for megabytes; a decoding step has 64 sums of some rows of 8 KB. Here a program has a
row. What it sends are words of 8 bytes, half of each the number of the call, so whoever reads a word sees whether it
has come, and nothing has to be waited for but the words themselves (the protocol that NCCL calls LL). The ranks' rows
are added in one order, so that all ranks get the same sum, bit for bit ("one-shot all-reduce").
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import begin, dependent

ROWS = 256
"""At most so many rows are summed this way; of more, a library sends every byte once instead of to every rank."""


class Mailbox:
    """Memory of every rank that all of them write to. Ranks call `sum` in the same order, with the same shapes.

    What a rank is sent in a call stands until the call after the next: it waits for the others in each, so nobody is
    two calls ahead. NOTE: a rank waits for ever for one that does not come, unless it is released.

    Args:
        rank: this one.
        boxes: [ranks] int64, addresses of each rank's [2, ranks, ROWS, row_bytes / 4] words, zeros at first.
        row_bytes: of the widest rows.
        memory: what has to live as long.
    """

    def __init__(self, rank: int, boxes: Tensor, row_bytes: int, memory: Any) -> None:
        self.rank, self.row_bytes = rank, row_bytes
        self._boxes, self._memory = boxes, memory
        self._calls = torch.zeros(ROWS, dtype=torch.int64, device=boxes.device)
        self._released = torch.zeros(1, dtype=torch.int32, device=boxes.device)
        self._one, self._aside = torch.ones(1, dtype=torch.int32), None
        if boxes.is_cuda:
            self._one = self._one.pin_memory()
            self._aside = torch.cuda.Stream(boxes.device)  # type: ignore[no-untyped-call]

    def release(self) -> None:
        """Let go this rank if it waits for another, now and later; what comes out means nothing."""
        # NOTE: a copy, since a kernel might find no place on a GPU on which others wait
        with torch.cuda.stream(self._aside):
            self._released.copy_(self._one, non_blocking=True)

    def serves(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether `sum` takes these rows."""
        row_bytes = x.shape[-1] * dtype.itemsize
        return x.shape[-2] <= ROWS and row_bytes <= self.row_bytes and row_bytes % 4 == 0

    def sum(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of all ranks' x, each rounded first.

        Args:
            x: [T, D], or parts of it that are added up first, [splits, T, D] float32.
            dtype: of 2 or 4 bytes.

        Returns:
            [T, D] of this dtype.
        """
        num_rows, dim = x.shape[-2:]
        out = torch.empty(num_rows, dim, dtype=dtype, device=x.device)
        words = dim * dtype.itemsize // 4
        block = triton.next_power_of_2(words)
        _sum_kernel[(num_rows,)](
            x,
            out,
            self._boxes,
            self._calls,
            self._released,
            dim,
            words,
            x.stride(0),
            self.row_bytes // 4,
            RANK=self.rank,
            RANKS=self._boxes.shape[0],
            ROWS=ROWS,
            PARTS=x.shape[0] if x.ndim == 3 else 1,
            HALVES=dtype.itemsize == 2,
            BLOCK=block,
            num_warps=min(16, max(4, block // 256)),
            **dependent(x.device),
        )
        return out


@triton.jit
def _sum_kernel(
    x_ptr,
    out_ptr,
    boxes_ptr,
    calls_ptr,
    released_ptr,
    dim,
    words,
    stride_part,
    row_words,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one row, at every rank. Of halves, word i has element i, and i + words above it."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, BLOCK)
    inside = word < words
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    call = (tl.load(calls_ptr + row) + 1) & 0x7FFFFFFF
    bits = _bits(_added(x_ptr + row * dim + word, inside, stride_part, PARTS).to(dtype), HALVES)
    if HALVES:
        above = _added(x_ptr + row * dim + words + word, inside, stride_part, PARTS).to(dtype)
        bits |= _bits(above, HALVES) << 16
    mine = bits | (call << 32)
    half = (call % 2) * RANKS
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            there = tl.load(boxes_ptr + rank).to(tl.pointer_type(tl.int64))
            tl.store(there + ((half + RANK) * ROWS + row) * row_words + word, mine, mask=inside)
    here = tl.load(boxes_ptr + RANK).to(tl.pointer_type(tl.int64))
    total = tl.zeros([BLOCK], tl.float32)
    total_above = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        came = mine
        if rank != RANK:
            sent = here + ((half + rank) * ROWS + row) * row_words + word
            missing = 1
            while missing > 0:
                came = tl.load(sent, mask=inside, other=0, volatile=True)
                # a part of what is summed, so that all warps see the same
                waits = tl.load(released_ptr, volatile=True) == 0
                missing = tl.sum((inside & waits & ((came >> 32) != call)).to(tl.int32), 0)
        total += _number(came, dtype, HALVES)
        if HALVES:
            total_above += _number(came >> 16, dtype, HALVES)
    tl.store(out_ptr + row * dim + word, total.to(dtype), mask=inside)
    if HALVES:
        tl.store(out_ptr + row * dim + words + word, total_above.to(dtype), mask=inside)
    tl.store(calls_ptr + row, call)  # NOTE: at the end, when every warp has read it: those sums are barriers


@triton.jit
def _added(x_ptr, inside, stride_part, PARTS: tl.constexpr):
    """Elements of a row, its parts added up."""
    x = tl.load(x_ptr, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + part * stride_part, mask=inside, other=0.0)
    return x


@triton.jit
def _bits(x, HALVES: tl.constexpr):
    """The bits of numbers, as the lower ones of int64."""
    bits = x.to(tl.uint16, bitcast=True) if HALVES else x.to(tl.uint32, bitcast=True)
    return bits.to(tl.int64)


@triton.jit
def _number(word, dtype: tl.constexpr, HALVES: tl.constexpr):
    """The numbers in the lower bits of words."""
    number = word.to(tl.uint16).to(dtype, bitcast=True) if HALVES else word.to(tl.uint32).to(dtype, bitcast=True)
    return number.to(tl.float32)
