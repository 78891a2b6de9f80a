"""Weights in 4 bits: groups of columns between a least and a greatest number, with a scale and a zero point each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from manyheads.config import ConfigError
from manyheads.quantization.base import CodedScheme, CodedWeight, in_pieces, used_scale

GROUP_SIZES = (128, 64, 32)
"""Columns that share a scale; the first that divides the number of columns is taken."""
ZERO = 8
"""The code that stands for 0 where a weight has no zero points of its own."""
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True, eq=False)
class Int4Weight(CodedWeight):
    """The codes are from 0 to 15, two to a byte, the even column's in the low half; zero points are codes too."""

    dtype = torch.uint8
    middle = ZERO

    def _has_groups_that_fit(self) -> bool:
        fits = self.zero is None or (self.zero.shape == self.scale.shape and self.zero.dtype == torch.uint8)
        return fits and self.group_size % 2 == 0

    @property
    def scheme(self) -> CodedScheme:
        return INT4

    @property
    def in_features(self) -> int:
        return self.values.shape[1] * 2

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        codes = unpack(self.values).float().view(self.shape[0], -1, self.group_size)
        codes -= ZERO if self.zero is None else self.zero[..., None]
        return codes.mul_(self.scale[..., None]).view(self.shape).to(dtype)


def pack(codes: Tensor) -> Tensor:
    """[..., n] codes from 0 to 15, of any integer type → [..., n / 2] uint8, the even ones in the low half."""
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """[..., n / 2] uint8 → [..., n] uint8 codes from 0 to 15."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _rounded(weight: Tensor) -> Int4Weight:
    """Each group's range is narrowed where that lowers the squared error."""
    size = next((size for size in GROUP_SIZES if weight.shape[1] % size == 0), None)
    if size is None:
        raise ConfigError(
            f"int4 needs weights whose columns come in groups of {', '.join(map(str, GROUP_SIZES))}; "
            f"one has {weight.shape[1]} columns. Take int8 or fp8"
        )
    groups = weight.reshape(len(weight), -1, size)
    low, high = groups.amin(-1, keepdim=True).clamp_(max=0), groups.amax(-1, keepdim=True).clamp_(min=0)
    best: tuple[Tensor, Tensor] | None = None
    least = torch.full_like(low, torch.inf)
    for shrink in _SHRINK:
        scale = used_scale((high - low) * (shrink / 15))
        zero = (-low * shrink / scale).round_().clamp_(0, 15)
        codes = (groups / scale).round_().add_(zero).clamp_(0, 15)
        error = ((codes - zero).mul_(scale) - groups).square_().sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = (
            (scale, zero) if best is None else (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
        )
    assert best is not None
    scale, zero = best
    codes = (groups / scale).round_().add_(zero).clamp_(0, 15)
    return Int4Weight(pack(codes.flatten(1)), scale.squeeze(-1), zero.squeeze(-1).to(torch.uint8))


INT4 = CodedScheme(
    name="int4",
    quantize=partial(in_pieces, _rounded),
    vocabulary="int8",  # which it can bear less than the layers can
    number_bytes=0.56,
    note_on_cpu="int4 saves neither time nor memory on a CPU: its weights are widened as they are loaded",
    bits=4,
    row_dtype=torch.int8,
    parts=2,
    max_splits=4,
    capability=(8, 0),
    widened_from=384,
)
