"""What adapters of low rank add to products (LoRA: Hu et al. 2021): each token's own adapter, many in one batch.

A product y = x Wᵀ becomes x Wᵀ + x Aᵀ Bᵀ, A and B those of the token's adapter. So the weights of all adapters stand in
one tensor, and the tokens of a step are put together by their adapters once for all layers (Punica: Chen et al. 2023;
S-LoRA: Sheng et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

FEW = 4
"""Tokens of an adapter, at most, that are multiplied together with those of other adapters."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """What N adapters add to K projections of the same input that are packed into one product."""

    a: Tensor
    """[N, K · R, in], contiguous: of each projection R rows; zeros where an adapter has fewer, or leaves it alone."""
    b: Tensor
    """[N, out, R], contiguous: a projection's outputs read its own R numbers. What an adapter multiplies its sum by is
    in it."""
    sizes: tuple[int, ...]
    """Outputs of each of the K projections; out in all."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.a.nbytes + self.b.nbytes


class Adapters(Protocol):
    """What adapters add on a device; one for all products of a model."""

    count: int
    """Adapters that there are."""

    def plan(self, which: Tensor) -> None:
        """Say which tokens come next.

        Args:
            which: [T] int64, each one's adapter, from 1 to N; 0 for none.
        """

    def add(self, y: Tensor, x: Tensor, weights: LowRank) -> None:
        """Add to a product what the tokens' adapters add to it.

        Args:
            y: [T, out], contiguous, in floating point; changed in place.
            x: [T, in]
        """


class TorchAdapters:
    """`Adapters` by torch, where the host may look at what the tokens have."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._many: list[tuple[int, Tensor]] = []  # adapter, from 0, and its tokens, of which there are more than FEW
        self._few: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def plan(self, which: Tensor) -> None:
        present = sorted(set(which.tolist()) - {0})
        groups = [(adapter - 1, torch.where(which == adapter)[0]) for adapter in present]
        few = [(adapter, tokens) for adapter, tokens in groups if len(tokens) <= FEW]
        if len(few) == 1:  # one alone has nothing to be put together with
            few = []
        taken = {adapter for adapter, _ in few}
        self._many = [(adapter, tokens) for adapter, tokens in groups if adapter not in taken]
        self._few = None
        if few:
            width = max(len(tokens) for _, tokens in few)
            rows = which.new_zeros(len(few), width)  # what pads them is computed in vain
            for place, (_, tokens) in enumerate(few):
                rows[place, : len(tokens)] = tokens
            real = [place * width + i for place, (_, tokens) in enumerate(few) for i in range(len(tokens))]
            adapters = which.new_tensor([adapter for adapter, _ in few])
            self._few = adapters, rows, which.new_tensor(real), torch.cat([tokens for _, tokens in few])

    def add(self, y: Tensor, x: Tensor, weights: LowRank) -> None:
        bounds = list(accumulate(weights.sizes, initial=0))
        for adapter, tokens in self._many:
            a, b = weights.a[adapter], weights.b[adapter]
            inner = (x[tokens] @ a.T).chunk(len(weights.sizes), dim=1)
            parts = [h @ b[low:high].T for h, low, high in zip(inner, bounds, bounds[1:], strict=False)]
            y.index_add_(0, tokens, _joined(parts).to(y.dtype))
        if self._few is None:
            return
        adapters, rows, real, tokens = self._few
        a, b = weights.a[adapters], weights.b[adapters]
        groups = torch.bmm(x[rows], a.transpose(1, 2)).chunk(len(weights.sizes), dim=2)
        parts = [
            torch.bmm(h, b[:, low:high].transpose(1, 2))
            for h, low, high in zip(groups, bounds, bounds[1:], strict=False)
        ]
        y.index_add_(0, tokens, _joined(parts).flatten(0, 1)[real].to(y.dtype))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
