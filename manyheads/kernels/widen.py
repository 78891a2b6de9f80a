"""Weights in 8 and 4 bits as kernels read them, and back in floating point: for products that none of ours serves, and
for those of so many rows that the largest of libraries' products gain more than it takes to widen a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import begin, dependent
from manyheads.kernels.rows import GROUP
from manyheads.quantization.base import CodedScheme
from manyheads.quantization.int4 import ZERO


@dataclass(frozen=True, eq=False)
class Arranged:
    """A `CodedWeight` in the form that `quantized.arrange` gives it, with rows of zeros at its end (`padded`)."""

    scheme: CodedScheme
    out_features: int
    in_features: int
    values: Tensor
    """[padded, in] int8 or float8_e4m3fn, or [padded, in / 2] uint8 (of int4 in groups of 128 as `arrange` says)."""
    scale: Tensor
    """[padded, groups] float32."""
    zero: Tensor | None
    """[padded, groups] int8, with the strides of `scale`: zero points less 8, from -8 to 7; None: 0 everywhere."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.in_features // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return self.values.nbytes + self.scale.nbytes + (self.zero.nbytes if self.zero is not None else 0)


PIECE = 4096
"""Rows of a weight that `multiply` widens at a time, at most."""
_ALIGNED = 128
_BLOCK = 2048
"""Columns that a program widens at most."""


def multiply(x: Tensor, weight: Arranged) -> Tensor:
    """x Wᵀ by cuBLAS: [T, out]. The weight is widened for this product alone, and a piece at a time, so that a piece is
    all the memory that it takes."""
    num_out = weight.out_features
    pieces = -(-num_out // PIECE)
    if pieces == 1:
        return F.linear(x, widen(weight, x.dtype))
    out = x.new_empty(x.shape[0], num_out)
    size = -(-num_out // (pieces * _ALIGNED)) * _ALIGNED
    for start in range(0, num_out, size):
        stop = min(start + size, num_out)
        torch.mm(x, widen(weight, x.dtype, start, stop).t(), out=out[:, start:stop])
    return out


def widen(weight: Arranged, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
    """The weight that it stands for, or some of its rows: [out, in], rounded once."""
    num_out, width = (weight.out_features if stop is None else stop) - start, weight.in_features
    out = torch.empty((num_out, width), dtype=dtype, device=weight.values.device)
    values, scale = weight.values[start:], weight.scale[start:]
    zero = scale if weight.zero is None else weight.zero[start:]  # without zero points it is not looked at
    in_pairs = weight.scheme.bits == 4 and weight.group_size == GROUP
    block = min(_BLOCK, triton.next_power_of_2(width))
    if in_pairs:
        block = max(block, 2 * GROUP)
    _widen_kernel[(num_out, -(-width // block))](
        values,
        scale,
        zero,
        out,
        width,
        values.shape[1],
        weight.group_size,
        *scale.stride(),
        INT4=weight.scheme.bits == 4,
        GROUP=GROUP if in_pairs else 0,
        HAS_ZERO=weight.zero is not None,
        MIDDLE=ZERO,
        BLOCK=block,
        num_warps=4,
        **dependent(out.device),
    )
    return out


@triton.jit
def _widen_kernel(
    values_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    width,
    stride_values,
    group_size,
    stride_scale,
    stride_group,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    MIDDLE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a part of a row. Weights in 4 bits are of pairs of groups (`quantized.arrange`) where GROUP says so,
    and each byte is read once; other groups are for products that are not worth the trouble."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    values_ptr += row * stride_values
    scale_ptr += row * stride_scale
    zero_ptr += row * stride_scale
    out_ptr += row * width
    first = tl.program_id(1) * BLOCK
    half = out_ptr.dtype.element_ty
    if not INT4:
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(values_ptr + column, mask=inside).to(tl.float32) * tl.load(scale_ptr)
        tl.store(out_ptr + column, value.to(half), mask=inside)
    elif GROUP > 0:
        pair = first // (2 * GROUP) + tl.arange(0, BLOCK // (2 * GROUP))
        within = tl.arange(0, GROUP)[None, :]
        there, there_upper = 2 * pair * GROUP < width, (2 * pair + 1) * GROUP < width
        packed = tl.load(values_ptr + pair[:, None] * GROUP + within, mask=there[:, None], other=0)
        group_at = 2 * pair * stride_group
        scale = tl.load(scale_ptr + group_at, mask=there, other=0.0)
        scale_upper = tl.load(scale_ptr + group_at + stride_group, mask=there_upper, other=0.0)
        code = ((packed & 15) ^ MIDDLE).to(tl.float32) - MIDDLE
        code_upper = ((packed >> 4) ^ MIDDLE).to(tl.float32) - MIDDLE
        if HAS_ZERO:
            code -= tl.load(zero_ptr + group_at, mask=there, other=0).to(tl.float32)[:, None]
            upper_at = zero_ptr + group_at + stride_group
            code_upper -= tl.load(upper_at, mask=there_upper, other=0).to(tl.float32)[:, None]
        out_at = out_ptr + 2 * pair[:, None] * GROUP + within
        tl.store(out_at, (code * scale[:, None]).to(half), mask=there[:, None])
        tl.store(out_at + GROUP, (code_upper * scale_upper[:, None]).to(half), mask=there_upper[:, None])
    else:
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        scale_at = column // group_size * stride_group
        scale = tl.load(scale_ptr + scale_at, mask=inside, other=0.0)
        packed = tl.load(values_ptr + column // 2, mask=inside, other=0)
        code = ((packed >> (column % 2 * 4).to(tl.uint8)) & 15).to(tl.float32) - MIDDLE
        if HAS_ZERO:
            code -= tl.load(zero_ptr + scale_at, mask=inside, other=0).to(tl.float32)
        tl.store(out_ptr + column, (code * scale).to(half), mask=inside)
