"""The norms that stand between the parts of a layer, each with what is added to the residual before it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from manyheads.models.parallel import Unsummed, summed
from manyheads.ops.base import Ops
from manyheads.quantization.base import CodedScheme


class Norm(ABC):
    """A norm of the last dimension.

    Args:
        multiplier: of what is added to the residual.
    """

    nbytes = 0
    """Bytes of its weights."""

    def __init__(self, multiplier: float = 1.0) -> None:
        self.multiplier = multiplier

    @abstractmethod
    def __call__(self, x: Any) -> Any:
        """The norm of x [T, D]; what `Linear.to_add` gives only goes through where there is none."""

    @abstractmethod
    def add(self, y: Tensor | Unsummed, residual: Tensor, scheme: CodedScheme | None) -> Any:
        """Add y to the residual [T, D] in place, and norm the sum; as `Ops.add_rms_norm`.

        Args:
            y: [T, D], or what a `Linear` may leave instead.
        """


class NoNorm(Norm):
    """Where a family has none: what comes is what goes."""

    def __call__(self, x: Any) -> Any:
        return x

    def add(self, y: Tensor | Unsummed, residual: Tensor, scheme: CodedScheme | None) -> Tensor:
        """The residual itself, in the end; y is not in parts."""
        return residual.add_(summed(y), alpha=self.multiplier)


class RmsNorm(Norm):
    """RMSNorm.

    Args:
        weight: [D], of the residual's type or float32.
        multiplier: as `Norm` has it.
    """

    def __init__(self, weight: Tensor, eps: float, ops: Ops, multiplier: float = 1.0) -> None:
        super().__init__(multiplier)
        self.weight, self.eps, self.ops, self.nbytes = weight, eps, ops, weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, y: Tensor | Unsummed, residual: Tensor, scheme: CodedScheme | None) -> Any:
        if isinstance(y, Unsummed):
            normed = None if scheme else y.add_rms_norm(residual, self.weight, self.eps, self.multiplier)
            if normed is not None:
                return normed
            y = y.sum()
        return self.ops.add_rms_norm(y, residual, self.weight, self.eps, scheme, self.multiplier)


class LayerNorm(Norm):
    """LayerNorm, with or without a bias.

    Args:
        weight, bias: [D]
        multiplier: as `Norm` has it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float, ops: Ops, multiplier: float = 1.0) -> None:
        super().__init__(multiplier)
        self.weight, self.bias, self.eps, self.ops = weight, bias, eps, ops
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, y: Tensor | Unsummed, residual: Tensor, scheme: CodedScheme | None) -> Any:
        y = summed(y)
        return self.ops.add_layer_norm(y, residual, self.weight, self.bias, self.eps, scheme, self.multiplier)
