"""Products with weights in 8 and 4 bits, for NVIDIA GPUs from Ampere on.

Few rows read the weight once, as it is stored, and widen it in registers: what counts is the bytes. Many rows count in
arithmetic: fp8 weights are multiplied with rows that are rounded to fp8 too, each by its own largest value; the others
are widened in memory, once a product.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.launch import begin, dependent
from manyheads.quantization.weight import ZERO, QuantizedWeight, unpack

MAX_ROWS = 128
"""Beyond, arithmetic counts."""
_BLOCK_OUT = 64
_FP8_MAX = 448.0
_GROUP = 128


def arrange(weight: QuantizedWeight) -> QuantizedWeight:
    """The form that the kernels read: int4 codes in groups of 128 stand so that byte j of a group holds its columns j
    and j + 64, and a program that widens a block reads x in two straight runs. Everything else stays as it is."""
    if weight.scheme != "int4" or weight.group_size != _GROUP:
        return weight
    codes = unpack(weight.values).view(weight.out_features, -1, 2, _GROUP // 2)
    values = (codes[:, :, 0] | (codes[:, :, 1] << 4)).flatten(1)
    return QuantizedWeight("int4", values, weight.scale, weight.zero)


def product(x: Tensor, weight: QuantizedWeight, splits: int = 1) -> Tensor:
    """x Wᵀ.

    Args:
        x: [T, in] in half precision, the last dimension contiguous.
        weight: [out, in], as `arrange` returns it.
        splits: programs that may share a row of the weight where rows are few.

    Returns:
        [T, out] of x's dtype; or, only where `splits` is above 1, [splits, T, out] float32 that are to be added up.
    """
    if serves(x, weight):
        return few_rows(x, weight, splits)
    if weight.scheme == "fp8" and _multiplies_fp8(x.device) and not any(n % 16 for n in weight.shape):
        codes, scale = quantize_rows(x)
        wide = torch._scaled_mm(codes, weight.values.t(), scale, weight.scale.t(), out_dtype=torch.bfloat16)
        return wide.to(x.dtype)
    return F.linear(x, widen(weight, x.dtype))


@lru_cache(maxsize=16)
def _multiplies_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def serves(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether `few_rows` takes this product."""
    return (
        x.shape[0] <= MAX_ROWS
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight.out_features % _BLOCK_OUT == 0
        and weight.in_features % 128 == 0
        and (weight.scheme != "int4" or weight.group_size == _GROUP)
    )


def few_rows(x: Tensor, weight: QuantizedWeight, splits: int) -> Tensor:
    """As `product`, for what `serves` says."""
    rows, width = x.shape
    num_out = weight.out_features
    block_rows = max(16, triton.next_power_of_2(rows))
    # a stage of the pipeline holds as many bytes of the weight as fit beside x
    block_in = 256 if block_rows <= 32 and width % 256 == 0 and weight.scheme != "int4" else 128
    share = -(-width // (splits * block_in)) * block_in
    if splits == 1:
        out = torch.empty((rows, num_out), dtype=x.dtype, device=x.device)
    else:
        out = torch.empty((splits, rows, num_out), dtype=torch.float32, device=x.device)
    zero = weight.scale if weight.zero is None else weight.zero  # without zero points it is not looked at
    _few_rows_kernel[(num_out // _BLOCK_OUT, splits)](
        x,
        weight.values,
        weight.scale,
        zero,
        out,
        rows,
        num_out,
        width,
        share,
        x.stride(0),
        INT4=weight.scheme == "int4",
        HAS_ZERO=weight.zero is not None,
        ZERO=ZERO,
        BLOCK_ROWS=block_rows,
        BLOCK_OUT=_BLOCK_OUT,
        BLOCK_IN=block_in,
        num_warps=4,
        num_stages=_stages(block_rows, weight.scheme),
        **dependent(x.device),
    )
    return out


def _stages(block_rows: int, scheme: str) -> int:
    """As deep a pipeline as shared memory holds: int4's blocks are a quarter as many bytes."""
    return 4 if scheme != "int4" or block_rows == 128 else 6 if block_rows == 64 else 8


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row to fp8, its largest value at 448.

    Args:
        x: [T, D], D up to 16384, the last dimension contiguous.

    Returns:
        [T, D] float8_e4m3fn and [T, 1] float32 scales.
    """
    rows, dim = x.shape
    codes = torch.empty((rows, dim), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(dim)
    warps = min(16, max(4, block // 512))
    _quantize_rows_kernel[(rows,)](
        x, codes, scale, dim, x.stride(0), MOST=_FP8_MAX, BLOCK=block, num_warps=warps, **dependent(x.device)
    )
    return codes, scale


def widen(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """What a weight stands for: [out, in], rounded once.

    Args:
        weight: as `arrange` returns it.
    """
    num_out, width = weight.shape
    out = torch.empty((num_out, width), dtype=dtype, device=weight.device)
    zero = weight.scale if weight.zero is None else weight.zero
    block = min(1024, triton.next_power_of_2(width))
    _widen_kernel[(num_out, -(-width // block))](
        weight.values,
        weight.scale,
        zero,
        out,
        width,
        weight.group_size,
        weight.scale.shape[1],
        INT4=weight.scheme == "int4",
        HALF_GROUP=_GROUP // 2 if weight.group_size == _GROUP else 0,
        HAS_ZERO=weight.zero is not None,
        ZERO=ZERO,
        BLOCK=block,
        num_warps=4,
        **dependent(weight.device),
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _few_rows_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    rows,
    num_out,
    width,
    share,
    stride_x,
    INT4: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a block of the weight's rows, one share of its columns. See linear.py."""
    begin(DEPENDENT)
    part = tl.program_id(1)
    at_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    at_row = tl.arange(0, BLOCK_ROWS)
    inside = (at_row < rows)[:, None]
    low = part * share
    high = tl.minimum(low + share, width)
    x_row = x_ptr + at_row[:, None].to(tl.int64) * stride_x
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    if INT4:
        # a block is a group, with one scale for each row
        half = tl.arange(0, BLOCK_IN // 2)
        weight_at = weight_ptr + at_out[:, None].to(tl.int64) * (width // 2) + low // 2 + half[None, :]
        x_at = x_row + low + half[None, :]
        group_at = at_out * (width // BLOCK_IN) + low // BLOCK_IN
        for _ in range(low, high, BLOCK_IN):
            packed = tl.load(weight_at)
            scale = tl.load(scale_ptr + group_at)
            zero = tl.load(zero_ptr + group_at).to(tl.float16) if HAS_ZERO else tl.full((BLOCK_OUT,), ZERO, tl.float16)
            first = tl.load(x_at, mask=inside, other=0.0)
            second = tl.load(x_at + BLOCK_IN // 2, mask=inside, other=0.0)
            found = tl.dot(_nibble(packed & 15, zero).to(first.dtype), tl.trans(first))
            found = tl.dot(_nibble(packed >> 4, zero).to(first.dtype), tl.trans(second), found)
            acc += found * scale[:, None]
            weight_at += BLOCK_IN // 2
            x_at += BLOCK_IN
            group_at += 1
    else:
        column = tl.arange(0, BLOCK_IN)
        weight_at = weight_ptr + at_out[:, None].to(tl.int64) * width + low + column[None, :]
        x_at = x_row + low + column[None, :]
        for _ in range(low, high, BLOCK_IN):
            codes = tl.load(weight_at)
            x = tl.load(x_at, mask=inside, other=0.0)
            acc = tl.dot(codes.to(x.dtype), tl.trans(x), acc)
            weight_at += BLOCK_IN
            x_at += BLOCK_IN
        acc *= tl.load(scale_ptr + at_out)[:, None]
    out_at = out_ptr + (part.to(tl.int64) * rows + at_row[None, :]) * num_out + at_out[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(at_row < rows)[None, :])


@triton.jit
def _nibble(code, zero):
    """Codes from 0 to 15 less their row's zero point, as float16.

    0x6400 is 1024 in float16, whose last four bits count ones: no conversion is needed.
    """
    return (code.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - (zero + 1024)[:, None]


@triton.jit
def _quantize_rows_kernel(
    x_ptr, codes_ptr, scale_ptr, dim, stride_x, MOST: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """One program: a row."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    x = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(x), 0)
    scale = tl.where(most > 0, most / MOST, 1.0)
    codes = tl.minimum(tl.maximum(x / scale, -MOST), MOST)
    tl.store(codes_ptr + row * dim + column, codes.to(codes_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _widen_kernel(
    values_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    width,
    group_size,
    num_groups,
    INT4: tl.constexpr,
    HALF_GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a part of a row."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    group = row * num_groups + column // group_size
    scale = tl.load(scale_ptr + group, mask=inside, other=0.0)
    if INT4:
        if HALF_GROUP > 0:  # arranged
            at = column // (2 * HALF_GROUP) * HALF_GROUP + column % HALF_GROUP
            upper = column // HALF_GROUP % 2
        else:
            at, upper = column // 2, column % 2
        packed = tl.load(values_ptr + row * (width // 2) + at, mask=inside, other=0)
        code = ((packed >> (upper * 4).to(tl.uint8)) & 15).to(tl.float32)
        zero = tl.load(zero_ptr + group, mask=inside, other=0).to(tl.float32) if HAS_ZERO else ZERO
        value = (code - zero) * scale
    else:
        value = tl.load(values_ptr + row * width + column, mask=inside).to(tl.float32) * scale
    tl.store(out_ptr + row * width + column, value.to(out_ptr.dtype.element_ty), mask=inside)
