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

from manyheads.kernels.dependent import begin, dependent
from manyheads.quantization.base import CodedScheme

GROUP = 128
"""So many columns share a scale in the weights of 4 bits that are multiplied (quantized.py)."""
MAX_DIM = 16384
"""A program holds rows of up to so many columns in registers."""
_GROUP = tl.constexpr(GROUP)
_MAX = tl.constexpr(127 * 257)
"""The greatest integer, so that 256 · high + low has both bytes between -128 and 127."""
_FP8_MAX = tl.constexpr(448.0)
_TINY = tl.constexpr(1e-30)


class QuantizedRows(NamedTuple):
    """Rows of activations [T, D] in 8 bits, for weights in a scheme.

    - Of two parts (int8, int4): x = scale · (256 · high + low), both int8: 16 bits in all, within 2 ** -16 of the row's
      largest value;
    - of one (fp8): x = scale · code, of float8_e4m3fn, the row's largest value at 448.
    """

    codes: Tensor
    """[parts · T, D]; of two parts, each row's high stands above its low."""
    scale: Tensor
    """[T] float32."""
    sums: Tensor | None
    """[groups, T] float32, for weights in 4 bits: of each group of columns the sum of 256 · high + low, by which zero
    points are multiplied."""
    dtype: torch.dtype
    """The activations' own type."""

    @property
    def shape(self) -> tuple[int, int]:
        """(T, D)"""
        return len(self.scale), self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    def at(self, rows: Tensor) -> QuantizedRows:
        """Some of them, by their numbers: [N] int64."""
        codes = self.codes.view(len(self.scale), -1, self.codes.shape[1])[rows].flatten(0, 1)
        sums = None if self.sums is None else self.sums[:, rows].contiguous()
        return QuantizedRows(codes, self.scale[rows], sums, self.dtype)


def empty_rows(like: Tensor, dim: int, scheme: CodedScheme) -> QuantizedRows:
    """Rows of so many columns for a weight in a scheme, yet to be written; as many as `like` has, and of its dtype."""
    rows = like.shape[0]
    codes = torch.empty((scheme.parts * rows, dim), dtype=scheme.row_dtype, device=like.device)
    scale = torch.empty(rows, dtype=torch.float32, device=like.device)
    sums = scale.new_empty((dim // GROUP, rows)) if scheme.bits == 4 else None
    return QuantizedRows(codes, scale, sums, like.dtype)


def where_to(out: Tensor | QuantizedRows) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """What a kernel that ends in `store_row` takes: pointers, of which those that it has no use for are any, and
    constants. A plain tensor is not quantized."""
    if not isinstance(out, QuantizedRows):
        return {"out_ptr": out, "scale_ptr": out, "sums_ptr": out}, {"QUANTIZE": False, "FP8": False, "SUMS": False}
    sums = out.scale if out.sums is None else out.sums
    return (
        {"out_ptr": out.codes, "scale_ptr": out.scale, "sums_ptr": sums},
        {"QUANTIZE": True, "FP8": out.codes.is_floating_point(), "SUMS": out.sums is not None},
    )


def quantize_rows(x: Tensor, scheme: CodedScheme) -> QuantizedRows:
    """Rows for the product with a weight.

    Args:
        x: [T, D], the last dimension contiguous.
        scheme: of the weight.
    """
    out = empty_rows(x, x.shape[1], scheme)
    rows, dim = x.shape
    block = triton.next_power_of_2(dim)
    pointers, constants = where_to(out)
    _quantize_kernel[(rows,)](
        x,
        **pointers,
        dim=dim,
        stride_x=x.stride(0),
        **constants,
        BLOCK=block,
        num_warps=min(32, max(4, block // 512)),
        **dependent(x.device),
    )
    return out


@triton.jit
def _quantize_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    sums_ptr,
    dim,
    stride_x,
    QUANTIZE: tl.constexpr,
    FP8: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a row, all of it in registers."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + column, mask=column < dim, other=0.0)
    store_row(x, out_ptr, scale_ptr, sums_ptr, row, dim, QUANTIZE, FP8, SUMS, BLOCK)


@triton.jit
def store_row(
    x,
    out_ptr,
    scale_ptr,
    sums_ptr,
    row,
    dim,
    QUANTIZE: tl.constexpr,
    FP8: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What is computed of a row, [BLOCK] numbers that are zero from dim on: as it is, or as codes and a scale.

    The row's number is also the program's, of as many as there are rows.
    """
    column = tl.arange(0, BLOCK)
    inside = column < dim
    if QUANTIZE:
        wide = x.to(tl.float32)
        most = tl.max(tl.abs(wide), 0)
        if FP8:
            scale = tl.where(most > 0, tl.maximum(most / _FP8_MAX, _TINY), 1.0)
            code = tl.minimum(tl.maximum(wide * (1.0 / scale), -_FP8_MAX), _FP8_MAX).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * dim + column, code, mask=inside)
        else:
            scale = tl.where(most > 0, tl.maximum(most / _MAX, _TINY), 1.0)
            code = tl.floor(tl.fma(wide, 1.0 / scale, 0.5)).to(tl.int32)
            high = (code + 128) >> 8
            out_at = out_ptr + row * 2 * dim + column
            tl.store(out_at, high.to(tl.int8), mask=inside)
            tl.store(out_at + dim, (code - high * 256).to(tl.int8), mask=inside)
            if SUMS:
                group = tl.arange(0, BLOCK // _GROUP)
                sums = tl.sum(tl.reshape(code, (BLOCK // _GROUP, _GROUP)), 1).to(tl.float32)  # exact: within 24 bits
                tl.store(sums_ptr + group * tl.num_programs(0) + row, sums, mask=group < dim // _GROUP)
        tl.store(scale_ptr + row, scale)
    else:
        tl.store(out_ptr + row * dim + column, x, mask=inside)
