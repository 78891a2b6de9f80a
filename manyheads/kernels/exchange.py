"""Sums over ranks, and rows of all of them side by side, in one kernel: each writes straight into the others' memory.

A library's all-reduce is made for megabytes; a decoding step has 64 sums of some rows of 8 KB. Here every rank sends
its rows to every other and adds up what it is sent ("one-shot all-reduce"), and the norm that comes next is part of the
kernel. Rows are sent in one of two ways:

- Few rows go as words of 8 bytes, half of each the number of the call, so whoever reads a word sees whether it has
  come, and nothing has to be waited for but the words themselves (the protocol that NCCL calls LL).
- More rows go as they are, half the bytes, and behind those of a program a flag with the number of the call; before it
  the program waits until its rows have arrived (NCCL's "simple" protocol).

The ranks' rows are added in one order, so that all ranks get the same sum, bit for bit, either way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import begin, dependent

FEW_ROWS = 64
"""At most so many rows go as words."""
SENT_ROWS = 1024
"""At most so many rows are sent by a rank; of more, a library sends every byte once instead of to every rank."""
PROGRAMS = 256
"""Row r is always program r % PROGRAMS's, so that it is sent into the two halves of a box in turns."""


class Mailbox:
    """Memory of every rank that all of them write to. Ranks call `sum` in the same order, with the same shapes.

    What a rank is sent in a call stands until the call after the next: it waits for the others in each, so nobody is
    two calls ahead. NOTE: a rank waits for ever for one that does not come, unless it is released.

    Args:
        rank: this one.
        boxes: [ranks] int64, addresses of each rank's box, of `box_bytes` bytes, zeros at first: words [2, ranks,
            FEW_ROWS, row_bytes / 4] int64, rows [2, ranks, most_rows, row_bytes], flags [2, ranks, PROGRAMS] int32.
        row_bytes: of the widest rows, a multiple of 4.
        memory: what has to live as long.
    """

    def __init__(self, rank: int, boxes: Tensor, row_bytes: int, memory: Any) -> None:
        self.rank, self.row_bytes, self.few_rows = rank, row_bytes, FEW_ROWS
        self.most_rows = most_rows(len(boxes))
        self._boxes, self._memory = boxes, memory
        rows = boxes + words_bytes(len(boxes), row_bytes)
        self._by_flags = torch.stack((rows, rows + 2 * len(boxes) * self.most_rows * row_bytes))
        self._calls = torch.zeros(PROGRAMS, dtype=torch.int64, device=boxes.device)
        self._released = torch.zeros(1, dtype=torch.int32, device=boxes.device)
        self._settings = {"RANK": rank, "RANKS": len(boxes), **dependent(boxes.device)}
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
        return x.shape[-2] <= self.most_rows and row_bytes <= self.row_bytes and row_bytes % 4 == 0

    def sum(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of all ranks' x, each rounded first.

        Args:
            x: [T, D], or parts of it that are added up first, [splits, T, D] float32.
            dtype: of 2 or 4 bytes.

        Returns:
            [T, D] of this dtype.
        """
        out = torch.empty(x.shape[-2:], dtype=dtype, device=x.device)
        self._sum(x, out, out, out, 0.0, 1.0, normed=False)  # without a norm, residual and weight are never read
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, multiplier: float) -> Tensor:
        """Add the sum to the residual [T, D] in place, and norm what comes of it, as `fused.add_rms_norm` does.

        Args:
            x: as of `sum`, whose dtype is the residual's.
            weight: [D]

        Returns:
            [T, D]
        """
        out = torch.empty_like(residual)
        self._sum(x, out, residual, weight, eps, multiplier, normed=True)
        return out

    def _sum(
        self, x: Tensor, out: Tensor, residual: Tensor, weight: Tensor, eps: float, multiplier: float, *, normed: bool
    ) -> None:
        num_rows, dim = out.shape
        size = out.dtype.itemsize
        pointers = x, out, residual, weight
        counts = self._calls, self._released
        numbers = eps, multiplier, dim, x.stride(0)
        settings = {
            "PARTS": x.shape[0] if x.ndim == 3 else 1,
            "NORMED": normed,
            **self._settings,
        }
        if num_rows <= self.few_rows:
            words = dim * size // 4
            block = triton.next_power_of_2(words)
            launch = {"HALVES": size == 2, "BLOCK": block, "num_warps": min(16, max(4, block // 256))}
            _words_kernel[(num_rows,)](
                *pointers,
                self._boxes,
                *counts,
                *numbers,
                words,
                self.row_bytes // 4,
                ROWS=FEW_ROWS,
                **launch,
                **settings,
            )
        else:
            block = triton.next_power_of_2(dim)
            launch = {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}
            _rows_kernel[(min(num_rows, PROGRAMS),)](
                *pointers, self._by_flags, *counts, *numbers, num_rows, self.row_bytes // size,
                ROWS=self.most_rows, PROGRAMS=PROGRAMS, **launch, **settings
            )  # fmt: skip

    def holds(self, x: Tensor) -> bool:
        """Whether `gather` takes these rows."""
        return len(x) * self._blocks(x) <= self.most_rows and x.dtype.itemsize in (2, 4)

    def gather(self, x: Tensor, size: int) -> Tensor:
        """All ranks' x [T, n] side by side, the first rank's first, and of those `size` columns: [T, size]."""
        num_rows, width = x.shape
        blocks, row_size = self._blocks(x), self.row_bytes // x.dtype.itemsize
        out = x.new_empty(num_rows, size)
        _gather_kernel[(min(num_rows * blocks, PROGRAMS),)](
            x,
            out,
            self._by_flags,
            self._calls,
            self._released,
            num_rows * blocks,
            blocks,
            width,
            size,
            x.stride(0),
            row_size,
            ROWS=self.most_rows,
            PROGRAMS=PROGRAMS,
            BLOCK=triton.next_power_of_2(row_size),
            num_warps=8,
            **self._settings,
        )
        return out

    def _blocks(self, x: Tensor) -> int:
        """How many of the box's rows one of x takes."""
        return -(-x.shape[1] * x.dtype.itemsize // self.row_bytes)


def most_rows(num_ranks: int) -> int:
    """Rows that so many ranks sum this way."""
    return SENT_ROWS // (num_ranks - 1)


def words_bytes(num_ranks: int, row_bytes: int) -> int:
    """Of the first part of a box."""
    return 2 * num_ranks * FEW_ROWS * row_bytes * 2


def box_bytes(num_ranks: int, row_bytes: int) -> int:
    """The size of a rank's box."""
    rows = 2 * num_ranks * most_rows(num_ranks) * row_bytes
    return words_bytes(num_ranks, row_bytes) + rows + 2 * num_ranks * PROGRAMS * 4


@triton.jit
def _words_kernel(
    x_ptr,
    out_ptr,
    residual_ptr,
    weight_ptr,
    boxes_ptr,
    calls_ptr,
    released_ptr,
    eps,
    multiplier,
    dim,
    stride_part,
    words,
    row_words,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    NORMED: tl.constexpr,
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
            there = _box(boxes_ptr + rank, tl.int64)
            tl.store(there + ((half + RANK) * ROWS + row) * row_words + word, mine, mask=inside)
    here = _box(boxes_ptr + RANK, tl.int64)
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
    at = row * dim + word
    if NORMED:
        total = _joined(residual_ptr + at, total, multiplier, inside, dtype)
        squares = tl.sum(total * total, 0)
        if HALVES:
            total_above = _joined(residual_ptr + at + words, total_above, multiplier, inside, dtype)
            squares += tl.sum(total_above * total_above, 0)
        scale = tl.rsqrt(squares / dim + eps)
        total *= scale * tl.load(weight_ptr + word, mask=inside, other=0.0).to(tl.float32)
        if HALVES:
            total_above *= scale * tl.load(weight_ptr + words + word, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(dtype), mask=inside)
    if HALVES:
        tl.store(out_ptr + at + words, total_above.to(dtype), mask=inside)
    tl.store(calls_ptr + row, call)  # NOTE: at the end, when every warp has read it: those sums are barriers


@triton.jit
def _rows_kernel(
    x_ptr,
    out_ptr,
    residual_ptr,
    weight_ptr,
    boxes_ptr,
    calls_ptr,
    released_ptr,
    eps,
    multiplier,
    dim,
    stride_part,
    num_rows,
    row_size,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PARTS: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: every so many rows, at every rank. It sends all of them before it waits for the others'."""
    begin(DEPENDENT)
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    call = (tl.load(calls_ptr + program) + 1) & 0x7FFFFFFF
    half = call.to(tl.int32) % 2 * RANKS
    for row in range(program, num_rows, PROGRAMS):
        mine = _added(x_ptr + row * dim + column, inside, stride_part, PARTS).to(dtype)
        for rank in tl.static_range(RANKS):
            if rank != RANK:
                there = _box(boxes_ptr + rank, dtype)
                tl.store(there + ((half + RANK) * ROWS + row) * row_size + column, mine, mask=inside)
    _meet(boxes_ptr + RANKS, released_ptr, call.to(tl.int32), half, program, RANK, RANKS, PROGRAMS)
    here = _box(boxes_ptr + RANK, dtype)
    for row in range(program, num_rows, PROGRAMS):
        at = row * dim + column
        total = tl.zeros([BLOCK], tl.float32)
        for rank in tl.static_range(RANKS):
            if rank == RANK:
                came = _added(x_ptr + at, inside, stride_part, PARTS).to(dtype)
            else:
                sent = here + ((half + rank) * ROWS + row) * row_size + column
                came = tl.load(sent, mask=inside, other=0.0, cache_modifier=".cg")
            total += came.to(tl.float32)
        if NORMED:
            total = _joined(residual_ptr + at, total, multiplier, inside, dtype)
            scale = tl.rsqrt(tl.sum(total * total, 0) / dim + eps)
            total *= scale * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, total.to(dtype), mask=inside)
    tl.store(calls_ptr + program, call)


@triton.jit
def _gather_kernel(
    x_ptr,
    out_ptr,
    boxes_ptr,
    calls_ptr,
    released_ptr,
    num_blocks,
    blocks,
    width,
    size,
    stride_x,
    row_size,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: every so many blocks of rows, each as wide as a row of the box, at every rank."""
    begin(DEPENDENT)
    program = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    call = (tl.load(calls_ptr + program) + 1) & 0x7FFFFFFF
    half = call.to(tl.int32) % 2 * RANKS
    for block in range(program, num_blocks, PROGRAMS):
        row, column = block // blocks, block % blocks * row_size + place
        inside = (place < row_size) & (column < width)
        mine = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0)
        for rank in tl.static_range(RANKS):
            if rank != RANK:
                there = _box(boxes_ptr + rank, dtype)
                tl.store(there + ((half + RANK) * ROWS + block) * row_size + place, mine, mask=inside)
        at = RANK * width + column
        tl.store(out_ptr + row * size + at, mine, mask=inside & (at < size))
    _meet(boxes_ptr + RANKS, released_ptr, call.to(tl.int32), half, program, RANK, RANKS, PROGRAMS)
    here = _box(boxes_ptr + RANK, dtype)
    for block in range(program, num_blocks, PROGRAMS):
        row, column = block // blocks, block % blocks * row_size + place
        inside = (place < row_size) & (column < width)
        for rank in tl.static_range(RANKS):
            if rank != RANK:
                sent = here + ((half + rank) * ROWS + block) * row_size + place
                came = tl.load(sent, mask=inside, other=0.0, cache_modifier=".cg")
                at = rank * width + column
                tl.store(out_ptr + row * size + at, came, mask=inside & (at < size))
    tl.store(calls_ptr + program, call)


@triton.jit
def _meet(
    flags_ptr, released_ptr, call, half, program, RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Tell the others that this program's rows are there, and wait for theirs."""
    tl.debug_barrier()  # every thread's rows are sent before the flag, which is one thread's
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            flags = _box(flags_ptr + rank, tl.int32)
            tl.atomic_xchg(flags + (half + RANK) * PROGRAMS + program, call, sem="release", scope="sys")
    flags = _box(flags_ptr + RANK, tl.int32)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            flag = flags + (half + rank) * PROGRAMS + program
            while (tl.atomic_add(flag, 0, sem="acquire", scope="sys") != call) & (
                tl.load(released_ptr, volatile=True) == 0
            ):
                pass
    tl.debug_barrier()


@triton.jit
def _joined(residual_ptr, total, multiplier, inside, dtype: tl.constexpr):
    """The residual with a sum added, each rounded as when they are computed apart."""
    residual = tl.load(residual_ptr, mask=inside, other=0.0)
    joined = (residual.to(tl.float32) + total.to(dtype).to(tl.float32) * multiplier).to(dtype)
    tl.store(residual_ptr, joined, mask=inside)
    return joined.to(tl.float32)


@triton.jit
def _box(address_ptr, dtype: tl.constexpr):
    """The address of a part of a box, which allows 16 bytes to be read or written at a time."""
    return tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(dtype)), 16)


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
