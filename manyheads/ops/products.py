"""Products with a weight in torch: the forms that a CPU multiplies with, and the plain one that every device has.

Decoding multiplies a few rows with each weight, over and over, so what counts is how a weight is read. On a CPU in
float32, F.linear hands the product to a GEMM that rearranges the weight at every call; here it is arranged once, when
the product is made. `TorchOps.product` says which weight takes which form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.ops.base import Product
from manyheads.quantization.base import CodedWeight
from manyheads.quantization.bitsandbytes import BitsandbytesWeight

PACK_HINT = 16
"""oneDNN chooses its packed layout for so many rows; it serves every number of them."""


class PlainProduct(Product):
    """The weight as it is, by F.linear: what is left where nothing better is known."""

    plain: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias, weight.nbytes)
        self.plain = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.plain, self.bias)


class HalfProduct(Product):
    """A float32 weight whose numbers are all float16 numbers, as of a checkpoint in half precision.

    It is kept as such and widened in registers: half the bytes, the same float32 arithmetic (FBGEMM).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias, 2 * weight.numel())
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return y


class OneDnnProduct(Product):
    """Any other float32 weight, in oneDNN's layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias, weight.nbytes)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_HINT)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y


class CodesProduct(Product):
    """A weight whose codes are float16 numbers, with one scale a row: multiplied as in `HalfProduct`, and scaled."""

    def __init__(self, weight: CodedWeight, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias, weight.nbytes + weight.values.nbytes)
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.values.float(), None)
        self._scale = weight.scale.flatten()  # [out]

    def __call__(self, x: Tensor) -> Tensor:
        return self._biased(torch.ops.quantized.linear_dynamic_fp16(x, self._packed).mul_(self._scale))


class LibraryProduct(Product):
    """A weight of the bitsandbytes library, which multiplies itself, and waits for the device in the middle of it."""

    can_be_captured = False

    def __init__(self, weight: BitsandbytesWeight, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias, weight.nbytes)
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return self._biased(self._weight(x))


def is_packed(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this type are brought into a form of their own there."""
    return device.type == "cpu" and dtype == torch.float32


def number_bytes(dtype: torch.dtype, device: torch.device, checkpoint: torch.dtype) -> int:
    """Bytes of a number in a weight in floating point that is multiplied with, known before it is loaded.

    A checkpoint in float32 may hold float16 numbers (`HalfProduct`): what it takes at least is what counts here.

    Args:
        dtype: of activations.
        checkpoint: of what is in the file.
    """
    if is_packed(dtype, device) and checkpoint in (torch.float16, torch.float32):
        return 2 if has_half_products() else 4
    return dtype.itemsize


def has_half_products() -> bool:
    """Whether this build of torch multiplies with float16 numbers on a CPU."""
    return "fbgemm" in torch.backends.quantized.supported_engines
