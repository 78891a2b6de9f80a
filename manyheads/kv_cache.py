"""The paged K/V cache, in the model's type or in 8 bits.

In 8 bits, a token's keys of a layer and kv head, and its values, are codes times one scale, which puts their largest
magnitude at the largest code. What a token's codes are depends on nothing but the token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""Largest codes. Nothing rounds to int8's -128."""
SMALLEST = 1e-30
"""Magnitudes count as this at least, so that a scale is never 0."""


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] as codes of a dtype and their scales [...] float32."""
    x = x.float()
    scale = x.abs().amax(-1).clamp_(min=SMALLEST) / LARGEST[dtype]
    codes = x / scale[..., None]
    if dtype == torch.int8:
        codes = codes.add_(0.5).floor_()
    return codes.to(dtype), scale


@dataclass(frozen=True)
class KVShape:
    """What a token keeps of K/V: so many layers of so many heads of so many numbers, keys and values each."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def with_layers(self, more: int) -> KVShape:
        """The same with more layers behind these, which are a drafter's."""
        return replace(self, num_layers=self.num_layers + more)


@dataclass(frozen=True, eq=False)
class Plane:
    """A layer's keys, or its values. `KVCache` says what they hold."""

    data: Tensor  # [pages, page size, kv_heads, head_dim]
    scale: Tensor | None  # [pages, page size, kv_heads]

    def write(self, slots: Tensor, x: Tensor) -> None:
        """Put x [T, kv_heads, head_dim] to slots [T] int64, rounded if that is how the cache keeps it."""
        if self.scale is None:
            self.data.flatten(0, 1).index_copy_(0, slots, x)
            return
        codes, scale = quantize(x, self.data.dtype)
        as_bytes(self.data).flatten(0, 1).index_copy_(0, slots, as_bytes(codes))
        self.scale.flatten(0, 1).index_copy_(0, slots, scale)

    def pages(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, page size, kv_heads, head_dim], a copy of pages [N] int64, widened to a dtype."""
        data = as_bytes(self.data).index_select(0, index).view(self.data.dtype)
        return data if self.scale is None else _widened(data, self.scale.index_select(0, index), dtype)

    def span(self, low: int, high: int, dtype: torch.dtype) -> Tensor:
        """[high - low, kv_heads, head_dim], slots that lie side by side, widened to a dtype; not to be written to."""
        data = self.data.flatten(0, 1)[low:high]
        return data if self.scale is None else _widened(data, self.scale.flatten(0, 1)[low:high], dtype)


@dataclass(frozen=True, eq=False)
class KVCache:
    """K/V of all layers, keys at 0 and values at 1; contiguous."""

    data: Tensor
    """[layers, 2, pages, page size, kv_heads, head_dim] in the model's type, float8_e4m3fn or int8."""
    scale: Tensor | None = None
    """[layers, 2, pages, page size, kv_heads] float32, to multiply codes with; None: data are no codes."""

    @classmethod
    def zeros(cls, kept: KVShape, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """An empty cache in the model's type, or of codes in one of `CODES`."""
        shape = (kept.num_layers, 2, num_pages, page_size, kept.num_kv_heads)
        scale = torch.zeros(shape, dtype=torch.float32, device=device) if dtype in LARGEST else None
        return cls(torch.zeros((*shape, kept.head_dim), dtype=dtype, device=device), scale)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.data.device

    @property
    def num_pages(self) -> int:
        """Pages, the dummy page included."""
        return self.data.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of entries and scales."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def layers(self) -> list[tuple[Plane, Plane]]:
        """Each layer's keys and values: views."""
        scales = [(None, None)] * len(self.data) if self.scale is None else [s.unbind(0) for s in self.scale]
        return [
            (Plane(keys, key_scale), Plane(values, value_scale))
            for (keys, values), (key_scale, value_scale) in zip(self.data, scales, strict=True)
        ]

    def move(self, source: Tensor, destination: Tensor) -> None:
        """Copy the K/V at slots `source` [N] int64 to slots `destination`, in all layers and all at once."""
        for tensor in (as_bytes(self.data), self.scale):
            if tensor is not None:
                flat = tensor.flatten(2, 3)
                flat[:, :, destination] = flat[:, :, source]


def as_bytes(codes: Tensor) -> Tensor:
    """Codes as integers, as which torch can copy and gather them; other types as they are."""
    return codes.view(torch.int8) if codes.dtype in LARGEST else codes


def _widened(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype).mul_(scale[..., None])
