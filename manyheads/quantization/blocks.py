"""Weights in blocks of 32 columns of a row, as GGUF files have them: codes, with a scale and a minimum of their own.

They are not a scheme: nothing is rounded to them. Where nothing multiplies them as they are, they are widened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.config import ConfigError
from manyheads.quantization.base import QuantizedWeight
from manyheads.quantization.int4 import Int4Weight, unpack

BLOCK = 32
"""Columns of a block."""


@dataclass(frozen=True, eq=False)
class BlockWeight(QuantizedWeight):
    """w[o, i] = code[o, i] · scale[o, i / 32] + minimum[o, i / 32], in float32."""

    codes: Tensor
    """[out, in / 2] uint8: 16 bytes a block, with its first 16 codes in their low halves and the others in the high
    ones; or [out, in] int8, from -128 to 127, without minima."""
    scale: Tensor
    """[out, in / 32] float32."""
    minimum: Tensor | None
    """The same, of codes from 0 to 15."""

    def __post_init__(self) -> None:
        per_block = BLOCK if self.minimum is None else BLOCK // 2
        fits = self.codes.shape == (self.scale.shape[0], self.scale.shape[1] * per_block)
        fits = fits and self.codes.dtype == (torch.int8 if self.minimum is None else torch.uint8)
        if not fits or (self.minimum is not None and self.minimum.shape != self.scale.shape):
            raise ValueError(f"codes {self.codes.dtype} {tuple(self.codes.shape)}, scale {tuple(self.scale.shape)}")

    @staticmethod
    def of_int4(weight: Int4Weight) -> BlockWeight | None:
        """The same numbers, to the last bit if scales are in half precision; None: zero points, or smaller groups."""
        if weight.zero is not None or weight.group_size % BLOCK:
            return None
        halves = unpack(weight.values).view(len(weight.values), -1, 2, BLOCK // 2)
        scale = weight.scale.repeat_interleave(weight.group_size // BLOCK, dim=1)
        codes = halves[:, :, 0] | (halves[:, :, 1] << 4)
        return BlockWeight(codes.flatten(1), scale, scale * -Int4Weight.middle)

    @property
    def shape(self) -> tuple[int, int]:
        return self.scale.shape[0], self.scale.shape[1] * BLOCK

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + (0 if self.minimum is None else self.minimum.nbytes)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """What it stands for: [out, in]."""
        rows, blocks = self.scale.shape
        if self.minimum is None:
            return (self.codes.view(rows, blocks, BLOCK).float() * self.scale[..., None]).view(self.shape).to(dtype)
        both = self.codes.view(rows, blocks, BLOCK // 2)
        codes = torch.cat((both & 15, both >> 4), dim=-1).float()
        return codes.mul_(self.scale[..., None]).add_(self.minimum[..., None]).view(self.shape).to(dtype)

    def part(self, dim: int, start: int, stop: int) -> BlockWeight:
        if stop > self.shape[dim] or (dim == 1 and (start % BLOCK or stop % BLOCK)):
            raise ConfigError(f"blocks of {BLOCK} columns: a weight {self.shape} has no part from {start} to {stop}")
        if dim == 0:
            return self._each(lambda tensor, _: tensor[start:stop])
        return self._each(lambda tensor, size: tensor[:, start * size // BLOCK : stop * size // BLOCK])

    def rows(self, order: Tensor) -> BlockWeight:
        """The same rows in another order, [out] int64."""
        return self._each(lambda tensor, _: tensor[order])

    def _each(self, change: Callable[[Tensor, int], Tensor]) -> BlockWeight:
        """Change every tensor, told how many of its numbers a block has."""
        minimum = None if self.minimum is None else change(self.minimum, 1).contiguous()
        codes = change(self.codes, BLOCK if minimum is None else BLOCK // 2).contiguous()
        return BlockWeight(codes, change(self.scale, 1).contiguous(), minimum)

    @staticmethod
    def cat(parts: Sequence[BlockWeight]) -> BlockWeight:
        if len({(part.codes.dtype, part.shape[1]) for part in parts}) > 1:
            raise ValueError("codes of 4 bits beside codes of 8")
        minima = [part.minimum for part in parts if part.minimum is not None]
        codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
        return BlockWeight(codes, scale, torch.cat(minima) if minima else None)
