"""A weight in 8 or 4 bits: its form in memory, and how a weight of a checkpoint comes into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.config import ConfigError

SCHEMES = ("int8", "fp8", "int4")
GROUP_SIZES = (128, 64, 32)
"""Columns that share a scale in int4; the first that divides the number of columns is taken."""
ZERO = 8
"""The int4 code that stands for 0 where a weight has no zero points of its own."""

_FP8_MAX = 448.0
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
_CHUNK = 2**24
"""Weights that are quantized at a time: what bounds the memory for it."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """w[o, i] = (code[o, i] − zero[o, g]) · scale[o, g], where g = i // group size; zero only for int4.

    Raises:
        ValueError: the parts do not fit each other.
    """

    scheme: str
    """`int8`, `fp8` or `int4`."""
    values: Tensor
    """int8 [out, in]; float8_e4m3fn [out, in]; or uint8 [out, in / 2], two int4 codes from 0 to 15 a byte, the even
    column's in the low half."""
    scale: Tensor
    """[out, groups] float32; one group for int8 and fp8."""
    zero: Tensor | None = None
    """[out, groups] uint8, in codes (0 to 15); None is 8 everywhere for int4, and 0 for the others."""

    def __post_init__(self) -> None:
        dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}[self.scheme]
        rows, groups = self.scale.shape
        fits = self.values.shape[0] == rows and self.in_features % groups == 0
        if self.values.dtype != dtype or self.scale.dtype != torch.float32 or not fits:
            raise ValueError(f"{self.scheme}: {self.values.dtype} {tuple(self.values.shape)}, scale {self.scale.shape}")
        if self.scheme == "int4":
            fits = self.zero is None or (self.zero.shape == self.scale.shape and self.zero.dtype == torch.uint8)
            fits &= self.group_size % 2 == 0
        else:
            fits = groups == 1 and self.zero is None
        if not fits:
            raise ValueError(f"{self.scheme}: {groups} groups of {self.group_size}, zero {self.zero}")

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.values.shape[1] * (2 if self.scheme == "int4" else 1)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), as of the weight it stands for."""
        return self.out_features, self.in_features

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.in_features // self.scale.shape[1]

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes + (self.zero.nbytes if self.zero is not None else 0)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out, in], computed in float32 and rounded once."""
        if self.scheme != "int4":
            return (self.values.float() * self.scale).to(dtype)
        codes = unpack(self.values).float().view(self.out_features, -1, self.group_size)
        codes -= ZERO if self.zero is None else self.zero[..., None]
        return codes.mul_(self.scale[..., None]).view(self.shape).to(dtype)

    def to(self, device: torch.device) -> QuantizedWeight:
        zero = None if self.zero is None else self.zero.to(device)
        return QuantizedWeight(self.scheme, self.values.to(device), self.scale.to(device), zero)

    @staticmethod
    def cat(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """One weight for projections that read the same input: parts below each other.

        Raises:
            ValueError: they differ in scheme or groups.
        """
        first = parts[0]
        if len(parts) == 1:
            return first
        if any((p.scheme, p.in_features, p.group_size) != (first.scheme, *_widths(first)) for p in parts):
            raise ValueError(f"quantized differently: {', '.join(f'{p.scheme} {p.scale.shape}' for p in parts)}")
        zero = None
        if any(p.zero is not None for p in parts):
            zero = torch.cat([_zeros(p) for p in parts])
        # bytes, since not every device concatenates float8
        values = torch.cat([p.values.view(torch.uint8) for p in parts]).view(first.values.dtype)
        return QuantizedWeight(first.scheme, values, torch.cat([p.scale for p in parts]), zero)


def quantize(weight: Tensor, scheme: str) -> QuantizedWeight:
    """Round a weight to a scheme, on the weight's device.

    - int8: symmetric, the largest of each row at 127;
    - fp8 (e4m3): the largest of each row at 448;
    - int4: groups of 128 columns between a least and a greatest value, narrowed where that lowers the squared error.
      Where 128 does not divide the columns, groups are of 64 or 32.

    Args:
        weight: [out, in], floating point.

    Raises:
        ConfigError: the columns cannot be grouped.
    """
    rows = max(1, _CHUNK // weight.shape[1])
    parts = torch.split(weight, rows)
    return QuantizedWeight.cat([_SCHEMES[scheme](part.float()) for part in parts])


def pack(codes: Tensor) -> Tensor:
    """[..., n] int4 codes from 0 to 15, of any integer type → [..., n / 2] uint8, the even ones in the low half."""
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """[..., n / 2] uint8 → [..., n] uint8 codes from 0 to 15."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _int8(weight: Tensor) -> QuantizedWeight:
    scale = _scale(weight.abs().amax(dim=1, keepdim=True) / 127)
    return QuantizedWeight("int8", (weight / scale).round_().to(torch.int8), scale)


def _fp8(weight: Tensor) -> QuantizedWeight:
    scale = _scale(weight.abs().amax(dim=1, keepdim=True) / _FP8_MAX)
    # a quotient may end a rounding error above the greatest number, which some devices turn into NaN
    return QuantizedWeight("fp8", (weight / scale).clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn), scale)


def _int4(weight: Tensor) -> QuantizedWeight:
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
        scale = _scale((high - low) * (shrink / 15))
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
    return QuantizedWeight("int4", pack(codes.flatten(1)), scale.squeeze(-1), zero.squeeze(-1).to(torch.uint8))


_SCHEMES = {"int8": _int8, "fp8": _fp8, "int4": _int4}


def _scale(scale: Tensor) -> Tensor:
    """What is zero everywhere has codes of zero, with whatever scale."""
    return torch.where(scale > 0, scale, 1.0)


def _widths(weight: QuantizedWeight) -> tuple[int, int]:
    return weight.in_features, weight.group_size


def _zeros(weight: QuantizedWeight) -> Tensor:
    return torch.full_like(weight.scale, ZERO, dtype=torch.uint8) if weight.zero is None else weight.zero
