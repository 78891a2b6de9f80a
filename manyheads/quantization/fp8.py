"""Weights in 8 bits as floating-point numbers (e4m3): the largest of each row at 448."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from manyheads.quantization.base import CodedScheme, CodedWeight, in_pieces, used_scale

_MAX = 448.0


@dataclass(frozen=True, eq=False)
class Fp8Weight(CodedWeight):
    """The codes are e4m3 numbers, and each row has a scale."""

    dtype = torch.float8_e4m3fn

    @property
    def scheme(self) -> CodedScheme:
        return FP8


def _rounded(weight: Tensor) -> Fp8Weight:
    scale = used_scale(weight.abs().amax(dim=1, keepdim=True) / _MAX)
    # a quotient may end a rounding error above the greatest number, which some devices turn into NaN
    return Fp8Weight((weight / scale).clamp_(-_MAX, _MAX).to(torch.float8_e4m3fn), scale)


FP8 = CodedScheme(
    name="fp8",
    quantize=partial(in_pieces, _rounded),
    vocabulary="fp8",
    number_bytes=1.0,
    bits=8,
    row_dtype=torch.float8_e4m3fn,
    parts=1,
    max_splits=2,
    capability=(8, 9),
)
