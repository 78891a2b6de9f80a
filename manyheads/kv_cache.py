"""The paged K/V cache, in the model's type or in 8 bits.

A page holds the K/V of some tokens in one group of layers. Most models have one group. Where most layers look back
through a window and few to the beginning (Gemma, gpt-oss), the few are a group, whose pages a text keeps, and the
others are groups of as many layers, whose pages it keeps as far as the window reaches. A text is known by its pages of
the first group alone; each of these has a *companion* in every other group, which holds the same tokens.

In 8 bits, a token's keys of a layer and kv head, and its values, are codes times one scale, which puts their largest
magnitude at the largest code. What a token's codes are depends on nothing but the token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

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


MOST_COMPANIONS = 7
"""Groups beside the first: each costs a step a table of its pages."""
MOST_PADDING = 1.2
"""Layers that groups have room for, over those that there are: what short texts pay for long ones."""


@dataclass(frozen=True)
class KVShape:
    """What a token keeps of K/V: in each layer so many heads of so many numbers, keys and values each."""

    windows: tuple[int | None, ...]
    """By layer, how many tokens back it looks, itself included; None: to the beginning."""
    num_kv_heads: int
    head_dim: int

    def with_layers(self, more: int) -> KVShape:
        """The same with more layers behind these, which are a drafter's, and look to the beginning."""
        return replace(self, windows=(*self.windows, *(None,) * more))

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Layers that share pages: one group of all, unless windows make it pay to tell them apart."""
        layers = tuple(range(len(self.windows)))
        whole = tuple(i for i in layers if self.windows[i] is None)
        others = tuple(i for i in layers if self.windows[i] is not None)
        size = max(len(whole), -(-len(others) // MOST_COMPANIONS))
        groups = (whole, *(others[start : start + size] for start in range(0, len(others), max(1, size))))
        if not whole or not others or size * len(groups) > MOST_PADDING * len(layers):
            return (layers,)
        return groups

    @property
    def num_companions(self) -> int:
        """Groups beside the first."""
        return len(self.groups) - 1

    @property
    def page_layers(self) -> int:
        """Layers that a page has room for."""
        return max(len(group) for group in self.groups)

    @property
    def window(self) -> int | None:
        """How many tokens back companions are looked at, or pages where these have none; None: to the beginning."""
        windows = [window for window in self.windows if window is not None]
        return max(windows) if self.num_companions or len(windows) == len(self.windows) else None


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
    """[layers of a page, 2, pages, page size, kv_heads, head_dim] in the model's type, float8_e4m3fn or int8."""
    scale: Tensor | None = None
    """[layers of a page, 2, pages, page size, kv_heads] float32, to multiply codes with; None: data are no codes."""
    groups: tuple[tuple[int, ...], ...] = ()
    """As `KVShape.groups`; empty is one of all layers."""
    companions: Tensor | None = None
    """[groups - 1, pages] int64, of each page of the first group its companions; None where there is one group."""

    @classmethod
    def zeros(cls, kept: KVShape, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """An empty cache in the model's type, or of codes in one of `CODES`. Its first pages have companions."""
        shape = (kept.page_layers, 2, num_pages, page_size, kept.num_kv_heads)
        scale = torch.zeros(shape, dtype=torch.float32, device=device) if dtype in LARGEST else None
        data = torch.zeros((*shape, kept.head_dim), dtype=dtype, device=device)
        if not kept.num_companions:
            return cls(data, scale)
        companions = torch.zeros(kept.num_companions, num_pages, dtype=torch.int64)
        count = (num_pages - 1) // len(kept.groups)
        for group in range(kept.num_companions):
            companions[group, 1 : count + 1] = torch.arange(1, count + 1) + (group + 1) * count
        return cls(data, scale, kept.groups, companions.to(device))

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

    @property
    def num_text_pages(self) -> int:
        """Pages that texts may have at once if all of these have companions; the first ones do in a new cache."""
        return (self.num_pages - 1) // max(1, len(self.groups))

    def layers(self) -> list[tuple[Plane, Plane]]:
        """Each layer's keys and values: views."""
        scales = [(None, None)] * len(self.data) if self.scale is None else [s.unbind(0) for s in self.scale]
        planes = [
            (Plane(keys, key_scale), Plane(values, value_scale))
            for (keys, values), (key_scale, value_scale) in zip(self.data, scales, strict=True)
        ]
        if not self.groups:
            return planes
        place = {layer: i for group in self.groups for i, layer in enumerate(group)}
        return [planes[place[layer]] for layer in sorted(place)]

    def group_of(self, layer: int) -> int:
        """The group that a layer belongs to."""
        return next((i for i, group in enumerate(self.groups) if layer in group), 0)

    def pages_in(self, group: int, pages: Tensor) -> Tensor:
        """Where a group of layers has what pages hold in the first; int64 of any shape."""
        return pages if self.companions is None or group == 0 else self.companions[group - 1][pages]

    def slots_in(self, group: int, slots: Tensor) -> Tensor:
        """The same for slots: page · page size + offset."""
        if self.companions is None or group == 0:
            return slots
        size = self.data.shape[3]
        return self.pages_in(group, slots // size) * size + slots % size

    def move(self, source: Tensor, destination: Tensor) -> None:
        """Copy the K/V at slots `source` [N] int64 to slots `destination`, in all layers and all at once."""
        for group in range(max(1, len(self.groups))):
            origin, target = self.slots_in(group, source), self.slots_in(group, destination)
            for tensor in (as_bytes(self.data), self.scale):
                if tensor is not None:
                    flat = tensor.flatten(2, 3)
                    flat[:, :, target] = flat[:, :, origin]


def as_bytes(codes: Tensor) -> Tensor:
    """Codes as integers, as which torch can copy and gather them; other types as they are."""
    return codes.view(torch.int8) if codes.dtype in LARGEST else codes


def _widened(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype).mul_(scale[..., None])
