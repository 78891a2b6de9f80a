"""Products with weights in 8 and 4 bits, for NVIDIA GPUs from Ampere on.

Of few rows, nothing widens a weight. Tensor cores multiply bytes with bytes, from shared memory, so a weight goes from
memory to them as it is stored; to make float16 numbers of its codes first takes longer than to read it (on an H200, 2
TB/s of int8, where float16 weights come at 3.9). What is made to fit is the activations, `QuantizedRows`. Of many rows
arithmetic is what takes the time, and two products of bytes are as slow as one of half precision at best, so a weight
is widened (widen.py); from how many on, the scheme says.

- int8: a row is two rows of bytes, both multiplied with the same weight; sums of integers, exact. So a row's result
  depends on nothing but the row and how many programs share its sums, and is as good as its 16 bits: the arithmetic of
  ops/integer.py.
- int4: the same, two groups at once: a register's bytes hold codes of both, and 16 times a code less 8 is what its half
  of the byte says as it stands there. Zero points are multiplied with the sums of a row's groups, once for all of them.
- fp8: a row is one row of fp8. Where there are many, cuBLAS multiplies them. Sums are rounded, and how depends on how
  many rows there are: up to 8, codes go to tensor cores as float16 numbers (Triton's choice on Hopper), of more as fp8.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels import widen
from manyheads.kernels.dependent import begin, dependent
from manyheads.kernels.rows import GROUP, MAX_DIM, QuantizedRows, quantize_rows
from manyheads.kernels.widen import Arranged
from manyheads.quantization.base import CodedScheme, CodedWeight
from manyheads.quantization.int4 import ZERO, unpack

_SHARE = 256
"""Columns that shares are counted in: a divisor of every block, so that they do not depend on the number of rows."""
_ALIGN_OUT = 128
"""A weight's rows are filled up to a multiple of this, which every block divides."""


def arrange(weight: CodedWeight) -> Arranged:
    """The form that the kernels read: rows come in whole blocks; and in 4 bits, of groups of 128 or several times that,

    - groups are of 128, those of a larger one alike;
    - groups come in pairs: byte j of a pair holds column j of the first in its lower half and that of the second in its
      upper half, both less 8, in two's complement. What is missing of the last pair is zero;
    - scales and zero points stand by group in memory: a program copies those of a block of rows. Behind a last group
      that is alone there are zeros in memory.
    """
    values, scale = _fill_up(weight.values), _fill_up(weight.scale)
    zero = None if weight.zero is None else _fill_up(weight.zero).to(torch.int8) - ZERO
    if weight.scheme.bits == 4 and weight.group_size % GROUP == 0:
        codes = F.pad(unpack(values) ^ ZERO, (0, -weight.in_features % (2 * GROUP)))
        codes = codes.view(len(values), -1, 2, GROUP)
        values = (codes[:, :, 0] | (codes[:, :, 1] << 4)).flatten(1)
        groups = weight.group_size // GROUP
        scale = _by_group(scale, groups)
        zero = None if zero is None else _by_group(zero, groups)
    return Arranged(weight.scheme, *weight.shape, values, scale, zero)


def _by_group(x: Tensor, repeats: int) -> Tensor:
    """[rows, groups] → [rows, groups · repeats], those of a group together in memory, where their number is even."""
    count = x.shape[1] * repeats
    return F.pad(x.repeat_interleave(repeats, 1).t(), (0, 0, 0, count % 2)).contiguous()[:count].t()


def _fill_up(x: Tensor) -> Tensor:
    """Rows of zeros at the end, up to whole blocks."""
    missing = -len(x) % _ALIGN_OUT
    if missing == 0:
        return x
    full = x.new_zeros(len(x) + missing, x.shape[1])
    full[: len(x)] = x
    return full


def product(x: Tensor | QuantizedRows, weight: Arranged, *, added: bool = False) -> Tensor:
    """x Wᵀ.

    Args:
        x: [T, in] in half precision, the last dimension contiguous; or quantized already, where `serves` says so.
        weight: [out, in].
        added: whether it is added to something next, and may come in parts: several programs share a row of the weight
            where there are too few without.

    Returns:
        [T, out] of x's dtype; or, only where it is added, [splits, T, out] float32 that are to be added up.
    """
    rows, width = x.shape
    padded, processors = len(weight.values), _processors(x.device)
    scheme = weight.scheme
    if not isinstance(x, QuantizedRows) and (rows >= scheme.widened_from or not serves(x, weight)):
        return widen.multiply(x, weight)
    if scheme.is_float and x.device.type == "cuda" and _is_for_cublas(rows, width, padded):
        codes, scale, _, dtype = x if isinstance(x, QuantizedRows) else quantize_rows(x, scheme)
        out_dtype = dtype if _scales_rows(x.device) else torch.bfloat16
        y = torch._scaled_mm(
            codes, weight.values.t(), scale[:, None], weight.scale.t(), out_dtype=out_dtype, use_fast_accum=True
        )
        return y[:, : weight.out_features].to(dtype).contiguous()
    splits = 1
    if added:
        blocks = _blocks(scheme, rows, width, padded, processors, shared_memory(x.device))
        splits = _splits(blocks.programs(rows, padded), scheme.max_splits, processors)
    return multiply(x, weight, splits)


def _is_for_cublas(rows: int, width: int, padded: int) -> bool:
    """Whether cuBLAS is faster with fp8, or the width comes in no blocks."""
    return width % GROUP != 0 or rows > (256 if padded <= width else 128)


@lru_cache(maxsize=16)
def _scales_rows(device: torch.device) -> bool:
    """Whether cuBLAS multiplies fp8 with a scale for each row; if not, what torch has instead returns bfloat16 only."""
    version = tuple(int(n) for n in (torch.version.cuda or "0").split(".")[:2])
    return torch.cuda.get_device_capability(device) == (9, 0) and version >= (12, 9)


@lru_cache(maxsize=16)
def multiplies(scheme: CodedScheme, device: torch.device) -> bool:
    """Whether `multiply` runs there; Triton's interpreter takes everything."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= scheme.capability


@lru_cache(maxsize=16)
def shared_memory(device: torch.device) -> int:
    """Bytes that a processor has for the stages of its programs."""
    if device.type != "cuda":
        return sys.maxsize
    index = torch.cuda.current_device() if device.index is None else device.index
    most = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return int(most) - 2**13  # scales, results


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    """How many processors the GPU has; for the interpreter, as many as an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def serves(x: Tensor, weight: Arranged) -> bool:
    """Whether this product is made of `QuantizedRows`."""
    blocks = GROUP if not weight.scheme.is_float or x.device.type != "cuda" else 16  # cuBLAS asks for these
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and weight.in_features % blocks == 0
        and (weight.scheme.bits != 4 or weight.group_size == GROUP)
        and multiplies(weight.scheme, x.device)
    )


def takes(x: Tensor, weight: Arranged) -> bool:
    """Whether `product` wants its rows quantized by the kernel that computes them; of x, dtype and rows are asked."""
    return len(x) < weight.scheme.widened_from and weight.in_features <= MAX_DIM and serves(x, weight)


def multiply(x: Tensor | QuantizedRows, weight: Arranged, splits: int) -> Tensor:
    """As `product`, by our kernels, for columns that come in groups of 128.

    Args:
        splits: programs that share a row of the weight.
    """
    rows, width = x.shape
    num_out, padded = weight.out_features, len(weight.values)
    memory = shared_memory(x.device)
    blocks = _blocks(weight.scheme, rows, width, padded, _processors(x.device), memory)
    stages = _stages(weight.scheme, blocks, memory)
    codes, x_scale, sums, _ = x if isinstance(x, QuantizedRows) else quantize_rows(x, weight.scheme)
    if splits == 1:
        out = torch.empty((rows, num_out), dtype=x.dtype, device=x.device)
    else:
        out = torch.empty((splits, rows, num_out), dtype=torch.float32, device=x.device)
    num_blocks = -(-width // blocks.columns)
    share = -(-width // (splits * _SHARE)) * _SHARE // blocks.columns
    # the weight's blocks follow each other slower than the rows': what is read twice is then in the cache
    grid = (-(-rows // blocks.rows), padded // blocks.out, splits)
    if weight.scheme.bits == 4:
        assert sums is not None
        _int4_kernel[grid](
            codes,
            weight.values,
            x_scale,
            sums,
            weight.scale,
            weight.scale if weight.zero is None else weight.zero,  # without zero points it is not looked at
            out,
            rows,
            num_out,
            padded,
            width,
            num_blocks,
            share,
            HAS_ZERO=weight.zero is not None,
            IS_ODD=width % blocks.columns != 0,
            IN_REGISTERS=x.device.type == "cuda",
            GROUP=GROUP,
            BLOCK_ROWS=blocks.rows,
            BLOCK_OUT=blocks.out,
            GROUPS=max(16, triton.next_power_of_2(2 * share)),
            STAGES=stages,
            num_warps=blocks.warps,
            **dependent(x.device),
        )
    else:
        _bytes_kernel[grid](
            codes,
            weight.values,
            x_scale,
            weight.scale,
            out,
            rows,
            num_out,
            num_blocks,
            share,
            PARTS=weight.scheme.parts,
            BLOCK_ROWS=blocks.rows,
            BLOCK_OUT=blocks.out,
            BLOCK_IN=blocks.columns,
            num_warps=blocks.warps,
            num_stages=stages,
            **dependent(x.device),
        )
    return out


class _Blocks(NamedTuple):
    """What a program multiplies at once, and how; stages are the most."""

    out: int
    rows: int
    columns: int
    warps: int
    stages: int
    alone: bool
    """Whether there are so few programs that each has a processor for itself."""

    def programs(self, rows: int, padded: int) -> int:
        return -(-rows // self.rows) * (padded // self.out)


_LARGE = 384
"""Of more rows than these, int8's blocks are as large as registers and shared memory hold: what programs read from the
L2 cache is what they wait for, and of large blocks it is half as much for as many products. On an H200 all products of
a 7B step take 5 % less of 512 rows, 14 % less of 1,024, and 5 % more of 256."""


def _blocks(scheme: CodedScheme, rows: int, width: int, padded: int, processors: int, memory: int) -> _Blocks:
    """For Hopper, by measurement: a program waits for each product of bytes, and two or more on a processor take turns.

    Of few rows, with as many bytes of the weight under way as there is room for; of more, what is read from the L2
    cache counts, and more programs beside each other do more than larger blocks.
    """
    if scheme.parts * scheme.bits == 16 and rows > _LARGE:
        large = _Blocks(128, 128, GROUP, 8, 4, True)
        if _stages(scheme, large, memory) >= 3:
            return large
    # of 8 rows, Triton takes other tensor-core instructions, which add up floating-point numbers in another order: a
    # row's zero points would come to another sum than among more
    least, most = (16, 64) if scheme.bits == 4 else (8, 128 // scheme.parts)
    side = min(most, max(least, triton.next_power_of_2(rows)))
    programs = -(-rows // side) * (padded // 64)
    alone, crowded = programs * scheme.max_splits <= processors, programs >= 2 * processors
    if scheme.bits == 4:
        return _Blocks(
            128 if side == 32 and crowded else 64, side, 2 * GROUP, 4, 3 if crowded or side == 64 else 4, alone
        )
    codes = scheme.parts * side
    if width % 256 == 0 and (codes <= 32 or (codes == 64 and not crowded)):
        return _Blocks(64, side, 256, 4, 4 if alone else 3, alone)
    stages = 3 if crowded and codes == 128 else 4
    return _Blocks(64, side, GROUP, 4, 6 if alone else stages, alone)


def _stages(scheme: CodedScheme, blocks: _Blocks, memory: int) -> int:
    """So many that two programs share a processor's memory, unless each has one, if it holds that many."""
    size = blocks.columns * (scheme.parts * blocks.rows + blocks.out * scheme.bits // 8)
    share = memory if blocks.alone else memory // 2
    return min(blocks.stages, max(share // size, min(3, memory // size)))


def _splits(programs: int, most: int, processors: int) -> int:
    """Doubled while there are processors without a program."""
    splits = 1
    while 2 * splits <= most and splits * programs < processors:
        splits *= 2
    return splits


@triton.jit(do_not_specialize=["rows", "num_blocks", "share"])
def _bytes_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    scale_ptr,
    out_ptr,
    rows,
    num_out,
    num_blocks,
    share,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a block of rows, a block of the weight's rows, one share of its columns. See linear.py.

    High and low rows alternate, and tensor cores leave two neighbours' sums in one thread.
    """
    at_part = tl.program_id(0) * PARTS * BLOCK_ROWS + tl.arange(0, PARTS * BLOCK_ROWS)
    at_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, num_blocks)
    width = num_blocks * BLOCK_IN
    column = first * BLOCK_IN + tl.arange(0, BLOCK_IN)
    weight_at = weight_ptr + at_out[:, None].to(tl.int64) * width + column[None, :]
    x_at = x_ptr + at_part[:, None].to(tl.int64) * width + column[None, :]
    inside = (at_part < PARTS * rows)[:, None]
    sums: tl.constexpr = tl.float32 if PARTS == 1 else tl.int32
    none: tl.constexpr = 0.0 if PARTS == 1 else 0
    acc = tl.zeros((BLOCK_OUT, PARTS * BLOCK_ROWS), sums)
    begin(DEPENDENT)
    for _ in range(first, last):
        acc = tl.dot(tl.load(weight_at), tl.trans(tl.load(x_at, mask=inside, other=none)), acc, out_dtype=sums)
        weight_at += BLOCK_IN
        x_at += BLOCK_IN
    y = added_up(acc, BLOCK_OUT, BLOCK_ROWS) if PARTS == 2 else acc
    y *= tl.load(scale_ptr + at_out)[:, None]
    _store(y, x_scale_ptr, out_ptr, at_out, rows, num_out, BLOCK_ROWS)


@triton.jit
def added_up(acc, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """256 times the high rows' sums and the low rows': what is beyond 32 bits."""
    high, low = tl.split(tl.reshape(acc, (BLOCK_OUT, BLOCK_ROWS, 2)))
    return high.to(tl.float32) * 256.0 + low.to(tl.float32)


@triton.jit
def _store(y, x_scale_ptr, out_ptr, at_out, rows, num_out, BLOCK_ROWS: tl.constexpr):
    """A block [BLOCK_OUT, BLOCK_ROWS] of a share's result, times the scales of rows."""
    at_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = at_row < rows
    y *= tl.load(x_scale_ptr + at_row, mask=in_rows, other=0.0)[None, :]
    out_at = out_ptr + (tl.program_id(2).to(tl.int64) * rows + at_row[None, :]) * num_out + at_out[:, None]
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=(at_out < num_out)[:, None] & in_rows[None, :])


@triton.jit(do_not_specialize=["rows", "num_pairs", "share"])
def _int4_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    sums_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    rows,
    num_out,
    padded,
    width,
    num_pairs,
    share,
    HAS_ZERO: tl.constexpr,
    IS_ODD: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """As `_bytes_kernel`; a block is a pair of groups, each with one scale for each of the weight's rows."""
    at_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at_part = tl.program_id(0) * 2 * BLOCK_ROWS + tl.arange(0, 2 * BLOCK_ROWS)
    at_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, num_pairs)
    column = tl.arange(0, GROUP)
    weight_at = weight_ptr + (at_out[:, None].to(tl.int64) * num_pairs + first) * GROUP + column[None, :]
    x_at = x_ptr + at_part[:, None].to(tl.int64) * width + first * 2 * GROUP + column[None, :]
    scale_at = scale_ptr + 2 * first * padded + at_out
    inside = (at_part < 2 * rows)[:, None]
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    # what the end needs is read at the beginning; weights, which no kernel writes, before there is anything to wait for
    if HAS_ZERO:
        group = 2 * first + tl.arange(0, GROUPS)
        mine = group < tl.minimum(2 * last, width // GROUP)
        zero_at = group[None, :] * padded + at_out[:, None]
        zero = tl.load(zero_ptr + zero_at, mask=mine[None, :], other=0).to(tl.float32)
        zero *= tl.load(scale_ptr + zero_at, mask=mine[None, :], other=0.0)
    begin(DEPENDENT)
    if HAS_ZERO:
        sums_at = sums_ptr + group[:, None] * rows + at_row[None, :]
        sums = tl.load(sums_at, mask=mine[:, None] & (at_row < rows)[None, :], other=0.0)
    # stages are said here, so that scales are copied ahead as well
    for pair in tl.range(first, last, num_stages=STAGES):
        packed = tl.load(weight_at)
        x = tl.load(x_at, mask=inside, other=0)
        there = inside
        if IS_ODD:
            there = inside & ((2 * pair + 1) * GROUP < width)
        x_upper = tl.load(x_at + GROUP, mask=there, other=0)
        scale, scale_upper = tl.load(scale_at), tl.load(scale_at + padded)
        acc += group_sums(lower(packed, IN_REGISTERS), x, BLOCK_OUT, BLOCK_ROWS) * scale[:, None]
        acc += group_sums(upper(packed, IN_REGISTERS), x_upper, BLOCK_OUT, BLOCK_ROWS) * scale_upper[:, None]
        weight_at += GROUP
        x_at += 2 * GROUP
        scale_at += 2 * padded
    acc *= 0.0625
    if HAS_ZERO:
        acc -= tl.dot(zero, sums, input_precision="tf32x3")
    _store(acc, x_scale_ptr, out_ptr, at_out, rows, num_out, BLOCK_ROWS)


@triton.jit
def group_sums(codes, x, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """The sums of one group, which are within 32 bits: 16 times those of codes less 8."""
    total = tl.dot(codes, tl.trans(x), out_dtype=tl.int32)
    high, low = tl.split(tl.reshape(total, (BLOCK_OUT, BLOCK_ROWS, 2)))
    return (high * 256 + low).to(tl.float32)


@triton.jit
def lower(packed, IN_REGISTERS: tl.constexpr):
    """16 times what the bytes' lower halves say: int8. Left to itself, the compiler takes a register's bytes apart."""
    if IN_REGISTERS:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return (packed << 4).to(tl.int8, bitcast=True)


@triton.jit
def upper(packed, IN_REGISTERS: tl.constexpr):
    """The same of the upper halves."""
    if IN_REGISTERS:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    return (packed & 240).to(tl.int8, bitcast=True)
