"""A linear layer of a model: which weight it has and how ranks share it; how it multiplies is up to `ops`."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manyheads.models.parallel import ALONE, Ranks, Unsummed, summed
from manyheads.ops.adapters import Adapters, LowRank
from manyheads.ops.base import Ops
from manyheads.quantization.base import CodedScheme, Weight

if TYPE_CHECKING:
    from manyheads.kernels.rows import QuantizedRows


class Split(Enum):
    """How ranks share the weight [out, in] of a layer."""

    OUTPUTS = auto()
    """By its rows: each computes some of the outputs, from all of the input, and whoever reads them is shared alike."""
    INPUTS = auto()
    """By its columns: each computes a share of every output, from some of the inputs, and the shares are added up."""
    GATHERED = auto()
    """By its rows, and each rank gets all outputs."""


class Linear:
    """y = x Wᵀ + b.

    A layer that is split by inputs may leave its result in parts, or as a rank's share, for whoever adds it to
    something next (`to_add`); it may be called only if it is made `whole`.

    Args:
        weight: [out, in], this rank's part.
        bias: [out] or None, this rank's part.
        dtype: of the activations.
        ops: of the device that holds the weight.
        split: how ranks share the weight.
        ranks: that share it.
        size: outputs of all ranks, where they are gathered; None: as many as the weight has.
        whole: whether a result in parts is of no use.
    """

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None,
        dtype: torch.dtype,
        ops: Ops,
        split: Split = Split.OUTPUTS,
        ranks: Ranks = ALONE,
        size: int | None = None,
        whole: bool = False,
    ) -> None:
        if split is Split.INPUTS and ranks.rank > 0:
            bias = None  # it is added once
        self.product = product = ops.product(weight, bias, dtype)
        self.adapters: LowRank | None = None
        """What adapters add, if they do."""
        self.share: Callable[[Any], Tensor] = product
        """What this rank multiplies, before ranks add up or gather what they have."""
        if split is Split.INPUTS and (ranks.size > 1 or not whole):
            self.share = product.parts
        self._multiply: Callable[[Any], Any] = self.share
        if split is Split.INPUTS and ranks.size > 1:
            add = ranks.sum if whole else partial(Unsummed, ranks)
            self._multiply = lambda x: add(product.parts(x), dtype)
        elif split is Split.GATHERED and ranks.size > 1:
            self._multiply = lambda x: ranks.gather(product(x), size or ranks.size * product.out_features)

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias, and of what adapters add."""
        return self.product.nbytes + (self.adapters.nbytes if self.adapters is not None else 0)

    def adapt(self, weights: LowRank, adapters: Adapters) -> None:
        """Add to every product, from now on, what the tokens' adapters add.

        Args:
            adapters: of the model; planned for the tokens of a call before it comes.
        """
        self.adapters, multiply = weights, self._multiply

        def adapted(x: Tensor) -> Tensor:
            y = summed(multiply(x))
            adapters.add(y if y.dim() == 2 else y[0], x, weights)  # parts are added up, so that one of them will do
            return y

        self._multiply = adapted

    def takes(self, x: Tensor) -> CodedScheme | None:
        """The scheme that whoever computes its rows may quantize them for (`Product.takes`)."""
        return self.product.takes(x) if self.adapters is None else None  # adapters read them as they are

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        """[T, in] → [T, out]."""
        y: Tensor = self._multiply(x)
        return y

    def to_add(self, x: Tensor | QuantizedRows) -> Tensor | Unsummed:
        """For `Norm.add`: [T, in] → [T, out]; or, split by inputs, [splits, T, out] float32 that are to be added up, or
        a share that is to be added to those of other ranks."""
        y: Tensor | Unsummed = self._multiply(x)
        return y
