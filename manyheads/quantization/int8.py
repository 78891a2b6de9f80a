"""Weights in 8 bits as integers: symmetric, the largest number of each row at 127."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from manyheads.quantization.base import CodedScheme, CodedWeight, in_pieces, used_scale


@dataclass(frozen=True, eq=False)
class Int8Weight(CodedWeight):
    """The codes are from -127 to 127 (of a checkpoint, -128 too), and each row has a scale."""

    dtype = torch.int8

    @property
    def scheme(self) -> CodedScheme:
        return INT8


def _rounded(weight: Tensor) -> Int8Weight:
    scale = used_scale(weight.abs().amax(dim=1, keepdim=True) / 127)
    return Int8Weight((weight / scale).round_().to(torch.int8), scale)


INT8 = CodedScheme(
    name="int8",
    quantize=partial(in_pieces, _rounded),
    vocabulary="int8",
    number_bytes=1.0,
    bits=8,
    row_dtype=torch.int8,
    parts=2,
    max_splits=2,
    capability=(8, 0),  # a T4's tensor cores take bytes, but Triton does not use them
    widened_from=1024,
)
