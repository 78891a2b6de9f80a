"""A linear layer of a model: which weight it has and how that can be shared out; how it multiplies is up to `ops`."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manyheads.ops.base import Ops
from manyheads.quantization.base import CodedScheme, Weight

if TYPE_CHECKING:
    from manyheads.kernels.rows import QuantizedRows


class Split(Enum):
    """The side by which the weight [out, in] of a layer can be taken apart."""

    OUTPUTS = auto()
    """It splits by its rows: each part computes some of the outputs, from all of the input."""
    INPUTS = auto()
    """It splits by its columns: each part computes a share of every output, from some of the inputs, and the shares are
    added up."""


class Linear:
    """y = x Wᵀ + b.

    A layer that is split by inputs may leave its result in parts, for whoever adds it to something next; so it may be
    called only where that happens. This is the one place where a model's weights would be shared out among devices:
    here the constructor would keep this device's part of the weight, and a call would add up what the devices hold.

    Args:
        weight: [out, in].
        bias: [out] or None.
        dtype: of the activations.
        ops: of the device that holds the weight.
        split: how the weight would be shared out.
    """

    def __init__(
        self, weight: Weight, bias: Tensor | None, dtype: torch.dtype, ops: Ops, split: Split = Split.OUTPUTS
    ) -> None:
        self.product = ops.product(weight, bias, dtype)
        self._multiply = self.product if split is Split.OUTPUTS else self.product.parts

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.product.nbytes

    def takes(self, x: Tensor) -> CodedScheme | None:
        """The scheme that whoever computes its rows may quantize them for (`Product.takes`)."""
        return self.product.takes(x)

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        """[T, in] → [T, out]; split by inputs, also [splits, T, out] float32 that are to be added up."""
        return self._multiply(x)
