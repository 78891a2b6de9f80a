"""A layer's experts, of which a router chooses a few for each token: the operations of models that have them, in torch.

Each of the T · K pairs of a token and an expert is a row of the experts' products; the pairs stand there by their
experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.ops.base import GroupedProduct, Product


@dataclass(frozen=True, eq=False)
class Routed:
    """Which experts each token goes to."""

    chances: Tensor
    """[T, K] float32: what the experts' results are multiplied by."""
    chosen: Tensor
    """[T, K] integers: which experts."""

    @cached_property
    def order(self) -> Tensor:
        """[T · K] int64, the pairs by their experts; pair t · K + k is token t's."""
        return self.chosen.flatten().argsort(stable=True)

    @cached_property
    def ends(self) -> list[int]:
        """For each expert up to the last that has pairs, where they end in `order`; it waits for the device."""
        ends: list[int] = self.chosen.flatten().bincount().cumsum(0).tolist()
        return ends


class LoopedProduct(GroupedProduct):
    """A product for each expert, one after the other: what serves a CPU, which waits for nobody.

    Args:
        products: of all experts.
    """

    def __init__(self, products: Sequence[Product]) -> None:
        super().__init__(sum(product.nbytes for product in products))
        self._products = products

    def __call__(self, x: Tensor, routed: Routed) -> Tensor:
        return self._by_expert(x[routed.order // routed.chosen.shape[1]], routed)

    def added(self, x: Tensor, routed: Routed) -> Tensor:
        y = self._by_expert(x, routed)
        place = torch.empty_like(routed.order)
        place[routed.order] = torch.arange(len(place), device=place.device)
        results = y[place].view(*routed.chosen.shape, -1)
        return (results * routed.chances[..., None]).sum(1).to(y.dtype)

    def _by_expert(self, x: Tensor, routed: Routed) -> Tensor:
        """Each pair's row [T · K, in] times its expert's weight."""
        starts, found = [0, *routed.ends], []
        for product, start, stop in zip(self._products, starts, routed.ends, strict=False):
            if stop > start:
                found.append(product(x[start:stop]))
        return torch.cat(found)


def route(x: Tensor, router: Tensor, bias: Tensor | None, top: int, adds_up: bool) -> Routed:
    """`Ops.route` in torch."""
    chances, chosen = F.linear(x, router, bias).softmax(-1, dtype=torch.float32).topk(top, dim=-1)
    if adds_up:
        chances = chances / chances.sum(-1, keepdim=True)
    return Routed(chances, chosen)
