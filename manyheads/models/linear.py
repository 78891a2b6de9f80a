"""The matrix product with a weight: the seam for quantization, and the place of the CPU's packed forms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.models.ops import has_kernels, linear

PARTS = 2
PACK_HINT = 16
"""Rows that oneDNN's packed layout is chosen for; it serves every number of rows."""


class Linear:
    """y = x Wᵀ + b.

    Decoding multiplies a few rows with each weight, over and over, so what counts is how a weight is read. On a CPU in
    float32, F.linear hands the product to a GEMM that rearranges the weight at every call; here it is arranged once:

    - `fp16`: a weight whose values are all float16 numbers (a checkpoint in half precision) is kept as such, and
      widened in registers: half the bytes, the same float32 arithmetic (FBGEMM);
    - `onednn`: any other float32 weight;
    - `few`: on a GPU in half precision; few rows go through a kernel of ours, many through F.linear;
    - `plain`: everything else, F.linear.

    Args:
        weight: [out, in].
        bias: [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.form = _form(weight, bias is not None)
        if self.form == "fp16":
            self.weight = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)
        elif self.form == "onednn":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_HINT)
        else:
            self.weight = weight
        self.nbytes = weight.numel() * (2 if self.form == "fp16" else weight.itemsize)
        self.nbytes += bias.nbytes if bias is not None else 0

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] → [T, out]."""
        y: Tensor
        if self.form == "few" and linear.serves(x, self.weight, linear.MAX_ROWS_WHOLE):
            y = linear.few_rows(x, self.weight, 1)
        elif self.form == "fp16":
            y = torch.ops.quantized.linear_dynamic_fp16(x, self.weight)
        elif self.form == "onednn":
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        else:
            y = F.linear(x, self.weight, self.bias)
        return y

    def parts(self, x: Tensor) -> Tensor:
        """The product where it is added to something next: [T, out], or parts of it, [splits, T, out] float32."""
        if self.form == "few" and linear.serves(x, self.weight):
            return linear.few_rows(x, self.weight, PARTS)  # type: ignore[no-any-return]
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
