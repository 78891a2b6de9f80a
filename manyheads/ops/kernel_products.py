"""Products with a weight by the kernels of `kernels/`; `TritonOps.product` says which weight takes which form."""

from __future__ import annotations

from torch import Tensor

from manyheads.kernels import linear, quantized
from manyheads.kernels.rows import QuantizedRows
from manyheads.ops.base import Product
from manyheads.ops.products import PlainProduct
from manyheads.quantization.base import CodedScheme, CodedWeight

PARTS = 2
"""Programs that share a row of a weight where the result is added to something next."""


class FewRowsProduct(PlainProduct):
    """A weight in half precision: few rows go through a kernel of ours, many through F.linear."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, None)

    def __call__(self, x: Tensor) -> Tensor:
        if linear.serves(x, self.plain, linear.MAX_ROWS_WHOLE):
            return linear.few_rows(x, self.plain, 1)
        return super().__call__(x)

    def parts(self, x: Tensor) -> Tensor:
        return linear.few_rows(x, self.plain, PARTS) if linear.serves(x, self.plain) else self(x)


class QuantizedProduct(Product):
    """A weight in codes, multiplied as it is stored (`kernels/quantized.py`)."""

    def __init__(self, weight: CodedWeight, bias: Tensor | None) -> None:
        self._weight = quantized.arrange(weight)
        super().__init__(weight.shape, bias, self._weight.nbytes)

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        return self._biased(quantized.product(x, self._weight))

    def parts(self, x: Tensor | QuantizedRows) -> Tensor:
        return quantized.product(x, self._weight, added=True) if self.bias is None else self(x)

    def takes(self, x: Tensor) -> CodedScheme | None:
        return self._weight.scheme if quantized.takes(x, self._weight) else None


def reads(weight: CodedWeight) -> bool:
    """Whether the kernels read the codes where the weight is.

    What a GPU does not multiply, they widen; but where there is no fp8 (before Ada), Triton does not even convert it.
    """
    return not weight.dtype.is_floating_point or quantized.multiplies(weight.scheme, weight.device)
