"""Weights in 8 and 4 bits as kernels read them, and back in floating point, for products that none of ours serves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.launch import begin, dependent
from manyheads.quantization.weight import ZERO

GROUP = 128
"""Columns that share a scale in the int4 weights that are multiplied (quantized.py)."""


@dataclass(frozen=True, eq=False)
class Arranged:
    """A `QuantizedWeight` in the form that `quantized.arrange` gives it, with rows of zeros at its end (`padded`)."""

    scheme: str
    out_features: int
    in_features: int
    values: Tensor
    """[padded, in] int8 or float8_e4m3fn, or [padded, in / 2] uint8."""
    scale: Tensor
    """[padded, groups] float32."""
    bias: Tensor | None
    """[padded, groups] int32, with the strides of `scale`: 128 less the zero point, in each of a word's bytes."""

    @property
    def group_size(self) -> int:
        return self.in_features // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes + (self.bias.nbytes if self.bias is not None else 0)


def widen(weight: Arranged, dtype: torch.dtype) -> Tensor:
    """What a weight stands for: [out, in], rounded once."""
    num_out, width = weight.out_features, weight.in_features
    out = torch.empty((num_out, width), dtype=dtype, device=weight.values.device)
    bias = weight.scale if weight.bias is None else weight.bias  # without zero points it is not looked at
    block = min(1024, triton.next_power_of_2(width))
    _widen_kernel[(num_out, -(-width // block))](
        weight.values,
        weight.scale,
        bias,
        out,
        width,
        weight.group_size,
        *weight.scale.stride(),
        INT4=weight.scheme == "int4",
        HALF_GROUP=GROUP // 2 if weight.group_size == GROUP else 0,
        HAS_BIAS=weight.bias is not None,
        ZERO=ZERO,
        BLOCK=block,
        num_warps=4,
        **dependent(out.device),
    )
    return out


@triton.jit
def _widen_kernel(
    values_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    width,
    group_size,
    stride_scale,
    stride_group,
    INT4: tl.constexpr,
    HALF_GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ZERO: tl.constexpr,
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
        if HALF_GROUP > 0:  # arranged
            at = column // (2 * HALF_GROUP) * HALF_GROUP + column % HALF_GROUP
            upper = column // HALF_GROUP % 2
        else:
            at, upper = column // 2, column % 2
        packed = tl.load(values_ptr + row * (width // 2) + at, mask=inside, other=0)
        code = ((packed >> (upper * 4).to(tl.uint8)) & 15).to(tl.float32)
        zero = (128 - (tl.load(bias_ptr + scale_at, mask=inside, other=0) & 255)).to(tl.float32) if HAS_BIAS else ZERO
        value = (code - zero) * scale
    else:
        value = tl.load(values_ptr + row * width + column, mask=inside).to(tl.float32) * scale
    tl.store(out_ptr + row * width + column, value.to(out_ptr.dtype.element_ty), mask=inside)
