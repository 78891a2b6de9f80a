"""Weights in 8 and 4 bits as kernels read them, and back in floating point, for products that none of ours serves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


def widen(weight: Arranged, dtype: torch.dtype) -> Tensor:
    """The weight that it stands for: [out, in], rounded once."""
    num_out, width = weight.out_features, weight.in_features
    out = torch.empty((num_out, width), dtype=dtype, device=weight.values.device)
    zero = weight.scale if weight.zero is None else weight.zero  # without zero points it is not looked at
    block = min(1024, triton.next_power_of_2(width))
    _widen_kernel[(num_out, -(-width // block))](
        weight.values,
        weight.scale,
        zero,
        out,
        width,
        weight.values.shape[1],
        weight.group_size,
        *weight.scale.stride(),
        INT4=weight.scheme.bits == 4,
        GROUP=GROUP if weight.group_size == GROUP else 0,
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
    """One program: a part of a row."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    group = column // group_size
    scale_at = row * stride_scale + group * stride_group
    scale = tl.load(scale_ptr + scale_at, mask=inside, other=0.0)
    if INT4:
        if GROUP > 0:  # arranged: pairs of groups, and codes less 8 in two's complement
            at = column // (2 * GROUP) * GROUP + column % GROUP
            upper, flipped = column // GROUP % 2, MIDDLE
        else:
            at, upper, flipped = column // 2, column % 2, 0
        packed = tl.load(values_ptr + row * stride_values + at, mask=inside, other=0)
        code = (((packed >> (upper * 4).to(tl.uint8)) & 15) ^ flipped).to(tl.float32) - MIDDLE
        if HAS_ZERO:
            code -= tl.load(zero_ptr + scale_at, mask=inside, other=0).to(tl.float32)
        value = code * scale
    else:
        value = tl.load(values_ptr + row * stride_values + column, mask=inside).to(tl.float32) * scale
    tl.store(out_ptr + row * width + column, value.to(out_ptr.dtype.element_ty), mask=inside)
