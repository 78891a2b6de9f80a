"""What a scheme is: the record of everything that depends on it, and the weight that it makes."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from manyheads.config import ConfigError

LEAST_GROUP = 32
"""The fewest columns with a scale of their own that products are made for."""
NEVER = sys.maxsize
"""Rows that no product has."""
_CHUNK = 2**24
"""Numbers that are quantized at a time, which bounds the memory that it takes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Scheme:
    """A way to keep weights in few bits. There is one record a scheme, and nothing outside asks for its name."""

    name: str
    """What users call it (`config.QUANTIZATIONS`)."""
    quantize: Callable[[Tensor], QuantizedWeight]
    """It rounds a weight [out, in] in floating point, on its device. It raises ConfigError where the scheme cannot hold
    the shape, or needs a library that is not there."""
    vocabulary: str | None
    """Name of the scheme that projections to the vocabulary take; None leaves them in floating point."""
    number_bytes: float
    """What a number of a layer's weight takes, its share of scales included, by which memory is estimated."""
    note_on_cpu: str | None = None
    """What a user on a CPU should know before the weights are loaded."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False, kw_only=True)
class CodedScheme(Scheme):
    """A scheme whose codes tensor cores multiply with rows of activations in 8 bits (`kernels/quantized.py`)."""

    quantize: Callable[[Tensor], CodedWeight]
    bits: int
    """A weight's code has 8 bits, or 4: then a byte holds two, and groups of columns have zero points."""
    row_dtype: torch.dtype
    """The activations' codes are of this type."""
    parts: int
    """A row of activations becomes so many rows of codes (`kernels/rows.py`)."""
    max_splits: int
    """So many programs may share the sums of a product that is added to something next."""
    capability: tuple[int, int]
    """GPUs from this compute capability on multiply the codes through Triton."""
    widened_from: int = NEVER
    """Of so many rows on, these stay in half precision, and the weight is widened for the product
    (`kernels/widen.py`)."""

    @property
    def is_float(self) -> bool:
        """Whether the codes are floating-point numbers, and not integers."""
        return self.row_dtype.is_floating_point


class QuantizedWeight(ABC):
    """A linear layer's weight [out, in] in few bits."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in), as of the weight that it stands for."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all its tensors."""

    @abstractmethod
    def part(self, dim: int, start: int, stop: int) -> QuantizedWeight:
        """Some of its rows (dim 0) or columns (dim 1), which stand for the same numbers. Raises ConfigError where it
        cannot be taken apart so."""

    @staticmethod
    @abstractmethod
    def cat(parts: Sequence[Any]) -> QuantizedWeight:
        """One weight for projections that read the same input: weights of this kind, one below the other.

        It raises ValueError where they are not quantized alike.
        """


Weight = Tensor | QuantizedWeight
"""A linear layer's weight [out, in], in floating point or in few bits."""


@dataclass(frozen=True, eq=False)
class CodedWeight(QuantizedWeight):
    """w[o, i] = (code[o, i] − zero[o, g]) · scale[o, g], where g = i // group size.

    What is said here holds for 8 bits: a code is a byte, a row has one scale, and there are no zero points. Parts that
    do not fit each other raise ValueError.
    """

    values: Tensor
    """[out, in] of `dtype`, or [out, in / 2] where a byte holds two codes."""
    scale: Tensor
    """[out, groups] float32."""
    zero: Tensor | None = None
    """[out, groups] uint8, the zero points as codes; None stands for `middle` everywhere."""

    dtype: ClassVar[torch.dtype]
    """The type of the values."""
    middle: ClassVar[int] = 0
    """The code that stands for 0 where a weight has no zero points of its own."""

    def __post_init__(self) -> None:
        rows, groups = self.scale.shape
        fits = self.values.shape[0] == rows and self.in_features % groups == 0
        if self.values.dtype != self.dtype or self.scale.dtype != torch.float32 or not fits:
            raise ValueError(f"{self.scheme}: {self.values.dtype} {tuple(self.values.shape)}, scale {self.scale.shape}")
        if not self._has_groups_that_fit():
            raise ValueError(f"{self.scheme}: {groups} groups of {self.group_size}, zero {self.zero}")

    def _has_groups_that_fit(self) -> bool:
        return self.scale.shape[1] == 1 and self.zero is None

    @property
    @abstractmethod
    def scheme(self) -> CodedScheme:
        """The scheme that it is in."""

    @property
    def in_features(self) -> int:
        """Columns of the weight that it stands for."""
        return self.values.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), as of the weight that it stands for."""
        return self.values.shape[0], self.in_features

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.in_features // self.scale.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and zero points."""
        return self.values.nbytes + self.scale.nbytes + (self.zero.nbytes if self.zero is not None else 0)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """What it stands for: [out, in], computed in float32 and rounded once."""
        return (self.values.float() * self.scale).to(dtype)

    def part(self, dim: int, start: int, stop: int) -> CodedWeight:
        if stop > self.shape[dim]:
            raise ConfigError(
                f"{self.scheme}: a quantized weight {self.shape} cannot be shared in parts of {stop - start}"
            )
        if dim == 0:
            rows = slice(start, stop)
            zero = None if self.zero is None else self.zero[rows].contiguous()
            return type(self)(self.values[rows].contiguous(), self.scale[rows].contiguous(), zero)
        per_byte = self.in_features // self.values.shape[1]
        values = self.values[:, start // per_byte : stop // per_byte].contiguous()
        if self.scale.shape[1] == 1 and self.zero is None:
            return type(self)(values, self.scale)
        # a group that is cut is kept as smaller ones, which have the same scale
        size = math.gcd(self.group_size, start, stop)
        if size < LEAST_GROUP:
            raise ConfigError(f"{self.scheme}: columns {start} to {stop} do not end with groups of {self.group_size}")

        def groups(of: Tensor) -> Tensor:
            return of.repeat_interleave(self.group_size // size, dim=1)[:, start // size : stop // size].contiguous()

        return type(self)(values, groups(self.scale), None if self.zero is None else groups(self.zero))

    def rows(self, order: Tensor) -> CodedWeight:
        """The same rows in another order, [out] int64."""
        # as bytes, since not every device indexes float8
        values = self.values.view(torch.uint8)[order].view(self.dtype)
        return type(self)(values, self.scale[order], None if self.zero is None else self.zero[order])

    @staticmethod
    def cat(parts: Sequence[CodedWeight]) -> CodedWeight:
        """Weights that are quantized alike, one below the other; raises ValueError where they are not."""
        first = parts[0]
        if len(parts) == 1:
            return first
        if len({(p.scheme, p.in_features, p.group_size) for p in parts}) > 1:
            raise ValueError(f"quantized differently: {', '.join(f'{p.scheme} {p.scale.shape}' for p in parts)}")
        zero = None
        if any(p.zero is not None for p in parts):
            middle = torch.full_like(first.scale[:1], first.middle, dtype=torch.uint8)
            zero = torch.cat([middle.expand_as(p.scale) if p.zero is None else p.zero for p in parts])
        # as bytes, since not every device concatenates float8
        values = torch.cat([p.values.view(torch.uint8) for p in parts]).view(first.dtype)
        return type(first)(values, torch.cat([p.scale for p in parts]), zero)


def in_pieces(rounded: Callable[[Tensor], CodedWeight], weight: Tensor) -> CodedWeight:
    """Round a weight [out, in] by a function that takes some of its rows, in float32."""
    rows = max(1, _CHUNK // weight.shape[1])
    return CodedWeight.cat([rounded(part.float()) for part in torch.split(weight, rows)])


def used_scale(scale: Tensor) -> Tensor:
    """The scale, but 1 where it is 0: what is zero everywhere has codes of zero, with whatever scale."""
    return torch.where(scale > 0, scale, 1.0)
