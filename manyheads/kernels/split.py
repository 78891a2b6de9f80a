"""Rows of activations as numbers of 8 bits, each row by its own largest value: what tensor cores multiply with weights
of 8 and 4 bits.

A byte is too coarse for an activation, and two are enough: a row is the sum of two rows, of which the second holds what
the first leaves. Of few rows, twice as many cost nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.launch import begin, dependent

MAX_DIM = 16384
"""Of a row that a program holds in registers."""
_MAX = tl.constexpr(127 * 257)
"""The greatest integer, so that 256 · high + low has both bytes between -128 and 127."""
_FP8_MAX = tl.constexpr(448.0)
_FP8_STEP = tl.constexpr(16.0)
"""Of e4m3's four bits of precision: what the second part is multiplied by."""
_TINY = tl.constexpr(1e-30)


class SplitRows(NamedTuple):
    """Rows of activations [T, D], each as two rows of 8 bits, one below the other.

    - int8, int4: x = scale · (256 · high + low), of int8: 16 bits in all, within 2 ** -16 of the row's largest value;
    - fp8: x = scale · (high + low / 16), of float8_e4m3fn: within 2 ** -8 of each value.
    """

    codes: Tensor
    """[2 · T, D], each row's high above its low."""
    scale: Tensor
    """[T] float32."""
    dtype: torch.dtype
    """Of the activations."""

    @property
    def shape(self) -> tuple[int, int]:
        """(T, D)"""
        return len(self.scale), self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device


def empty_rows(like: Tensor, dim: int, scheme: str) -> SplitRows:
    """Rows of so many columns for a weight in a scheme, yet to be written; as many as `like` has, and of its dtype."""
    rows = like.shape[0]
    code = torch.float8_e4m3fn if scheme == "fp8" else torch.int8
    codes = torch.empty((2 * rows, dim), dtype=code, device=like.device)
    return SplitRows(codes, torch.empty(rows, dtype=torch.float32, device=like.device), like.dtype)


def split_rows(x: Tensor, scheme: str) -> SplitRows:
    """Each row as two.

    Args:
        x: [T, D], the last dimension contiguous.
        scheme: of the weight.
    """
    out = empty_rows(x, x.shape[1], scheme)
    _launch(x, out.codes, out.scale, FP8=scheme == "fp8", PARTS=2)
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row to fp8, its largest value at 448.

    Args:
        x: [T, D], the last dimension contiguous.

    Returns:
        [T, D] float8_e4m3fn and [T, 1] float32 scales.
    """
    rows, dim = x.shape
    codes = torch.empty((rows, dim), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    _launch(x, codes, scale, FP8=True, PARTS=1)
    return codes, scale


def _launch(x: Tensor, codes: Tensor, scale: Tensor, **const: bool | int) -> None:
    rows, dim = x.shape
    block = triton.next_power_of_2(dim)
    _split_kernel[(rows,)](
        x,
        codes,
        scale,
        dim,
        x.stride(0),
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
        **const,
        **dependent(x.device),
    )


@triton.jit
def _split_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    dim,
    stride_x,
    FP8: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a row, all of it in registers."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    x = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    store_row(x, codes_ptr, scale_ptr, row, dim, column, inside, FP8, PARTS)


@triton.jit
def store_row(x, codes_ptr, scale_ptr, row, dim, column, inside, FP8: tl.constexpr, PARTS: tl.constexpr):
    """A row's codes and scale, of float32 numbers that are zero where not `inside`."""
    most = tl.max(tl.abs(x), 0)
    codes_at = codes_ptr + row * PARTS * dim + column
    if FP8:
        scale = tl.where(most > 0, tl.maximum(most / _FP8_MAX, _TINY), 1.0)
        x = x / scale
        high = tl.minimum(tl.maximum(x, -_FP8_MAX), _FP8_MAX).to(codes_ptr.dtype.element_ty)
        tl.store(codes_at, high, mask=inside)
        if PARTS == 2:
            # clamped, since what cuts off instead of rounding leaves more
            left = tl.minimum(tl.maximum((x - high.to(tl.float32)) * _FP8_STEP, -_FP8_MAX), _FP8_MAX)
            tl.store(codes_at + dim, left.to(codes_ptr.dtype.element_ty), mask=inside)
    else:
        scale = tl.where(most > 0, tl.maximum(most / _MAX, _TINY), 1.0)
        code = tl.floor(x / scale + 0.5).to(tl.int32)
        high = (code + 128) >> 8
        tl.store(codes_at, high.to(tl.int8), mask=inside)
        tl.store(codes_at + dim, (code - high * 256).to(tl.int8), mask=inside)
    tl.store(scale_ptr + row, scale)
