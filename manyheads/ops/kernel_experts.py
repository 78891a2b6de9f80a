"""The operations of ops/experts.py by the kernels of `kernels/`: nothing waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.kernels import experts, quantized, routing
from manyheads.kernels.routing import Groups
from manyheads.kernels.rows import QuantizedRows
from manyheads.kernels.widen import Arranged
from manyheads.ops import kernel_products
from manyheads.ops.base import GroupedProduct
from manyheads.ops.experts import Routed
from manyheads.quantization.base import CodedScheme, CodedWeight, Weight
from manyheads.quantization.blocks import BlockWeight
from manyheads.quantization.schemes import join


@dataclass(frozen=True, eq=False)
class KernelRouted(Routed):
    """Which experts each token goes to, and the tokens put together by them."""

    groups: Groups


class KernelGroupedProduct(GroupedProduct):
    """The experts' weights one below the other, in floating point or in codes.

    Args:
        weight: [experts · out, in]
        bias: [experts · out] or None.
        count: experts.
    """

    def __init__(self, weight: Tensor | Arranged, bias: Tensor | None, count: int) -> None:
        super().__init__(weight.nbytes + (0 if bias is None else bias.nbytes))
        self._weight, self._bias, self._count = weight, bias, count

    def __call__(self, x: Tensor, routed: KernelRouted) -> Tensor:
        return experts.product(x, self._weight, self._bias, self._count, routed.groups)

    def added(self, x: Tensor | QuantizedRows, routed: KernelRouted) -> Tensor:
        return experts.product(x, self._weight, self._bias, self._count, routed.groups, routed.chances)

    def takes(self, x: Tensor) -> CodedScheme | None:
        weight = self._weight
        return weight.scheme if isinstance(weight, Arranged) and experts.takes(weight) else None


def route(x: Tensor, router: Tensor, bias: Tensor | None, top: int, adds_up: bool) -> KernelRouted:
    """`Ops.route` by kernels."""
    chances, chosen = routing.route(x, router, bias, top, adds_up)
    return KernelRouted(chances, chosen, routing.group(chosen, len(router)))


def grouped(weights: Sequence[Weight], bias: Tensor | None, dtype: torch.dtype) -> KernelGroupedProduct | None:
    """`Ops.grouped` by kernels; None where a library multiplies with the weights.

    Codes that the kernels do not multiply where the weights are, they widen once, here.
    """
    count = len(weights)
    if all(isinstance(weight, CodedWeight) for weight in weights):
        coded = join(weights)
        assert isinstance(coded, CodedWeight)
        if kernel_products.reads(coded):
            arranged = quantized.arrange(coded)
            if experts.multiplies(arranged, dtype):
                return KernelGroupedProduct(arranged, bias, count)
    plain = [w.dequantize(dtype) if isinstance(w, CodedWeight | BlockWeight) else w for w in weights]
    if not all(isinstance(weight, Tensor) for weight in plain):
        return None
    weight = join(plain)
    assert isinstance(weight, Tensor)
    return KernelGroupedProduct(weight, bias, count)
