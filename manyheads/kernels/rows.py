"""Rows of activations as numbers of 8 bits, each row by its own largest value: what tensor cores multiply with weights
of 8 and 4 bits.

A byte is too coarse an integer for an activation, and two are enough: for integer weights a row is the sum of two rows,
of which the second holds what the first leaves. Of few rows, twice as many cost nothing. For fp8 it is one row of fp8
("W8A8", a scale per token), as is usual for models in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.launch import begin, dependent

PARTS = {"int8": 2, "int4": 2, "fp8": 1}
"""Rows of codes for a row of activations, by the weight's scheme."""
MAX_DIM = 16384
"""Of a row that a program holds in registers."""
_MAX = tl.constexpr(127 * 257)
"""The greatest integer, so that 256 · high + low has both bytes between -128 and 127."""
_FP8_MAX = tl.constexpr(448.0)
_TINY = tl.constexpr(1e-30)


class QuantizedRows(NamedTuple):
    """Rows of activations [T, D] in 8 bits.

    - int8, int4: x = scale · (256 · high + low), of int8: 16 bits in all, within 2 ** -16 of the row's largest value;
    - fp8: x = scale · code, of float8_e4m3fn, the row's largest value at 448.
    """

    codes: Tensor
    """[parts · T, D], each row's high above its low."""
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


def empty_rows(like: Tensor, dim: int, scheme: str) -> QuantizedRows:
    """Rows of so many columns for a weight in a scheme, yet to be written; as many as `like` has, and of its dtype."""
    rows = like.shape[0]
    code = torch.float8_e4m3fn if scheme == "fp8" else torch.int8
    codes = torch.empty((PARTS[scheme] * rows, dim), dtype=code, device=like.device)
    return QuantizedRows(codes, torch.empty(rows, dtype=torch.float32, device=like.device), like.dtype)


def quantize_rows(x: Tensor, scheme: str) -> QuantizedRows:
    """For the product with a weight.

    Args:
        x: [T, D], the last dimension contiguous.
        scheme: of the weight.
    """
    out = empty_rows(x, x.shape[1], scheme)
    rows, dim = x.shape
    block = triton.next_power_of_2(dim)
    _quantize_kernel[(rows,)](
        x,
        out.codes,
        out.scale,
        dim,
        x.stride(0),
        FP8=scheme == "fp8",
        BLOCK=block,
        num_warps=min(32, max(4, block // 512)),
        **dependent(x.device),
    )
    return out


@triton.jit
def _quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, dim, stride_x, FP8: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """One program: a row, all of it in registers."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    x = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    store_row(x, codes_ptr, scale_ptr, row, dim, column, inside, FP8)


@triton.jit
def store_row(x, codes_ptr, scale_ptr, row, dim, column, inside, FP8: tl.constexpr):
    """A row's codes and scale, of float32 numbers that are zero where not `inside`."""
    most = tl.max(tl.abs(x), 0)
    if FP8:
        scale = tl.where(most > 0, tl.maximum(most / _FP8_MAX, _TINY), 1.0)
        code = tl.minimum(tl.maximum(x * (1.0 / scale), -_FP8_MAX), _FP8_MAX).to(codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + row * dim + column, code, mask=inside)
    else:
        scale = tl.where(most > 0, tl.maximum(most / _MAX, _TINY), 1.0)
        code = tl.floor(tl.fma(x, 1.0 / scale, 0.5)).to(tl.int32)
        high = (code + 128) >> 8
        codes_at = codes_ptr + row * 2 * dim + column
        tl.store(codes_at, high.to(tl.int8), mask=inside)
        tl.store(codes_at + dim, (code - high * 256).to(tl.int8), mask=inside)
    tl.store(scale_ptr + row, scale)
