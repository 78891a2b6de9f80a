"""The matrix product with a weight: the seam for quantization, and the place of the CPU's packed forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.models.ops import has_kernels, linear, quantized
from manyheads.quantization import integer
from manyheads.quantization.bitsandbytes import BitsandbytesWeight
from manyheads.quantization.scheme import Weight
from manyheads.quantization.weight import QuantizedWeight

if TYPE_CHECKING:
    from manyheads.kernels.rows import QuantizedRows

PARTS = 2
PACK_HINT = 16
"""Rows that oneDNN's packed layout is chosen for; it serves every number of rows."""
INTEGER_SIZE = 2**23
"""Values of an int8 weight from which on integer products pay on a CPU; below, rounding the activations costs more."""


class Linear:
    """y = x Wᵀ + b.

    Decoding multiplies a few rows with each weight, over and over, so what counts is how a weight is read. On a CPU in
    float32, F.linear hands the product to a GEMM that rearranges the weight at every call; here it is arranged once:

    - `fp16`: a weight whose values are all float16 numbers (a checkpoint in half precision) is kept as such, and
      widened in registers: half the bytes, the same float32 arithmetic (FBGEMM);
    - `onednn`: any other float32 weight;
    - `few`: on a GPU in half precision; few rows go through a kernel of ours, many through F.linear;
    - `plain`: everything else, F.linear.

    Quantized weights:

    - `integer`: large int8 weights on a CPU (integer.py);
    - `codes`: other int8 and fp8 weights on a CPU: their codes are float16 numbers, so they are multiplied as in
      `fp16`, and the result is scaled;
    - `quantized`: on a GPU, by kernels of ours (kernels/quantized.py);
    - `bitsandbytes`: that library's own.

    What is left, such as int4 on a CPU and fp8 on GPUs before Ada, is widened here once and takes one of the forms
    above.

    Args:
        weight: [out, in].
        bias: [out] or None.
        dtype: of the activations; needed for a quantized weight.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.scale: Tensor | None = None  # [out], form `codes`
        self.weight: Any
        if isinstance(weight, BitsandbytesWeight):
            self.form, self.weight, self.nbytes = "bitsandbytes", weight, weight.nbytes
        elif isinstance(weight, QuantizedWeight) and (form := _quantized_form(weight, dtype)) is not None:
            self.form, self.nbytes = form, weight.nbytes
            if form == "codes":
                self.weight = torch.ops.quantized.linear_prepack_fp16(weight.values.float(), None)
                self.scale = weight.scale.flatten()
                self.nbytes += weight.values.nbytes
            elif form == "quantized":
                self.weight = quantized.arrange(weight)
                self.nbytes = self.weight.nbytes
            else:
                self.weight = integer.IntegerProduct(weight)
        else:
            self._pack(weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight)
        self.nbytes += bias.nbytes if bias is not None else 0

    def _pack(self, weight: Tensor) -> None:
        self.form = _form(weight, self.bias is not None)
        if self.form == "fp16":
            self.weight = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), self.bias)
        elif self.form == "onednn":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_HINT)
        else:
            self.weight = weight
        self.nbytes = weight.numel() * (2 if self.form == "fp16" else weight.itemsize)

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph may hold the product: bitsandbytes waits for the device in the middle of its own."""
        return self.form != "bitsandbytes"

    def takes(self, x: Tensor) -> str | None:
        """The scheme that `ops` may quantize rows of input for; None: they come as they are.

        Args:
            x: of the input's dtype.
        """
        if self.form != "quantized" or not quantized.takes(x, self.weight):
            return None
        return self.weight.scheme  # type: ignore[no-any-return]

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        """[T, in] → [T, out]."""
        y: Tensor
        if self.form == "quantized":
            y = quantized.product(x, self.weight)
            return y if self.bias is None else y.add_(self.bias)
        assert isinstance(x, Tensor)
        if self.form == "few" and linear.serves(x, self.weight, linear.MAX_ROWS_WHOLE):
            y = linear.few_rows(x, self.weight, 1)
        elif self.form == "fp16":
            y = torch.ops.quantized.linear_dynamic_fp16(x, self.weight)
        elif self.form == "onednn":
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        elif self.form == "codes":
            y = torch.ops.quantized.linear_dynamic_fp16(x, self.weight).mul_(self.scale)
            y = y if self.bias is None else y.add_(self.bias)
        elif self.form in ("integer", "bitsandbytes"):
            y = self.weight(x)
            y = y if self.bias is None else y.add_(self.bias)
        else:
            y = F.linear(x, self.weight, self.bias)
        return y

    def parts(self, x: Tensor | QuantizedRows) -> Tensor:
        """The product where it is added to something next: [T, out], or parts of it, [splits, T, out] float32."""
        if self.form == "few" and linear.serves(x, self.weight):
            return linear.few_rows(x, self.weight, PARTS)  # type: ignore[no-any-return]
        if self.form == "quantized" and self.bias is None:
            return quantized.product(x, self.weight, added=True)  # type: ignore[no-any-return]
        return self(x)


def _form(weight: Tensor, has_bias: bool) -> str:
    if has_kernels(weight.device) and weight.dtype in (torch.float16, torch.bfloat16) and not has_bias:
        return "few"
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return "plain"
    exact = torch.equal(weight.half().float(), weight)
    if exact and "fbgemm" in torch.backends.quantized.supported_engines:
        return "fp16"
    return "onednn" if torch._C._has_mkldnn else "plain"


def _quantized_form(weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """None where it is widened once."""
    if weight.device.type != "cpu":
        # what a GPU does not multiply, its kernels widen; but where there is no fp8, Triton does not even convert it
        served = has_kernels(weight.device) and (weight.scheme != "fp8" or quantized.multiplies("fp8", weight.device))
        return "quantized" if served else None
    if dtype != torch.float32 or weight.scheme == "int4":
        return None
    if weight.scheme == "int8" and weight.values.numel() >= INTEGER_SIZE and integer.is_exact():
        return "integer"
    return "codes" if "fbgemm" in torch.backends.quantized.supported_engines else None
