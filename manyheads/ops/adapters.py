"""What adapters of low rank add to products (LoRA: Hu et al. 2021): each token's own adapter, many in one batch.

A product y = x Wᵀ becomes x Wᵀ + x Aᵀ Bᵀ, A and B those of the token's adapter. So the weights of all adapters stand in
one tensor, and the tokens of a step are put together by their adapters once for all layers (Punica: Chen et al. 2023;
S-LoRA: Sheng et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 2
"""Tokens of an adapter, at most, that are multiplied one by one."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """What N adapters add to K projections of the same input that are packed into one product.

    A projection has R numbers between the two factors; where an adapter has fewer, or leaves the projection alone, they
    are zero.
    """

    a: Tensor
    """[N, in, K · R], contiguous: Aᵀ of the K projections side by side."""
    b: Tensor
    """[N · R · out], the K projections' Bᵀ one behind the other, each [N, R, its outputs]. What an adapter multiplies
    its sum by is in it."""
    sizes: tuple[int, ...]
    """Outputs of each projection; out in all."""

    @classmethod
    def zeros(cls, count: int, rank: int, inputs: int, sizes: Sequence[int], **kind: Any) -> LowRank:
        """Room for N = `count` adapters of R = `rank`; `kind` is dtype and device."""
        a = torch.zeros(count, inputs, len(sizes) * rank, **kind)
        return cls(a, torch.zeros(count * rank * sum(sizes), **kind), tuple(sizes))

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[2] // len(self.sizes)

    @cached_property
    def parts(self) -> list[Tensor]:
        """Bᵀ of each projection, [N, R, its outputs]."""
        count, rank = len(self.a), self.rank
        pieces = torch.split(self.b, [count * rank * size for size in self.sizes])
        return [piece.view(count, rank, size) for piece, size in zip(pieces, self.sizes, strict=True)]

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

    def keep(self, rows: Tensor) -> None:
        """Say which of these tokens go on.

        Args:
            rows: [N] int64
        """

    def add(self, y: Tensor, x: Tensor, weights: LowRank) -> None:
        """Add to a product what the tokens' adapters add to it.

        Args:
            y: [T, out], contiguous, in floating point; changed in place.
            x: [T, in], what y was made of.
        """


class TorchAdapters:
    """`Adapters` by torch, where the host may look at what the tokens have.

    Tokens of an adapter that has many are multiplied with it as ever. The others are bags: a token's sum is that of
    some rows of all adapters' weights, each times a number, which are read where they lie (`F.embedding_bag`).
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._which = torch.empty(0, dtype=torch.int64)
        self._many: list[tuple[int, Tensor]] = []  # adapter, from 0, and its tokens
        self._few: tuple[Tensor, Tensor] | None = None  # tokens, and the adapter of each
        self._rows: dict[int, Tensor] = {}  # by rows that an adapter has in a weight, those of the few tokens' adapters

    def plan(self, which: Tensor) -> None:
        self._which, given = which, which.tolist()
        present = sorted(set(given) - {0})
        many = [adapter for adapter in present if given.count(adapter) > FEW]
        self._many = [(adapter - 1, torch.where(which == adapter)[0]) for adapter in many]
        self._rows = {}
        tokens = [token for token, adapter in enumerate(given) if adapter and adapter not in many]
        self._few = None
        if tokens:
            places = which.new_tensor(tokens)
            self._few = places, which[places] - 1

    def keep(self, rows: Tensor) -> None:
        self.plan(self._which[rows])

    def add(self, y: Tensor, x: Tensor, weights: LowRank) -> None:
        if not self._many and self._few is None:
            return
        outputs, parts = torch.split(y, list(weights.sizes), dim=1), weights.parts
        for adapter, tokens in self._many:
            inner = (x[tokens] @ weights.a[adapter]).chunk(len(parts), dim=1)
            for out, h, b in zip(outputs, inner, parts, strict=True):
                out.index_add_(0, tokens, (h @ b[adapter]).to(y.dtype))
        if self._few is None:
            return
        tokens, _ = self._few
        are_all = len(tokens) == len(x)
        inner = self._bag(x if are_all else x[tokens], weights.a).chunk(len(parts), dim=1)
        for out, h, b in zip(outputs, inner, parts, strict=True):
            added = self._bag(h.contiguous(), b).to(y.dtype)
            out.add_(added) if are_all else out.index_add_(0, tokens, added)

    def _bag(self, x: Tensor, weight: Tensor) -> Tensor:
        """Each few token's x times its adapter's weight: [n, rows] times [N, rows, columns] → [n, columns]."""
        rows = weight.shape[1]
        if rows not in self._rows:
            assert self._few is not None
            self._rows[rows] = self._few[1][:, None] * rows + torch.arange(rows, device=x.device)
        return F.embedding_bag(self._rows[rows], weight.flatten(0, 1), per_sample_weights=x, mode="sum")
