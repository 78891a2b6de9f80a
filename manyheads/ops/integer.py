"""An int8 weight on a CPU, multiplied as integers, to float precision.

Processors multiply bytes four times as fast as float32 numbers, but a byte is too coarse for an activation. So a row
of activations is rounded to 16 bits, x = a · (256 · high + low), and both bytes are multiplied with the same weight:
twice the rows, still half the time. The sums are exact, so a row's result depends on nothing but the row.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from manyheads.ops.base import Product
from manyheads.quantization.int8 import Int8Weight

LEAST_SIZE = 2**23
"""From so many numbers of a weight on these products pay; below, rounding the activations costs more."""
_ZERO = 128
"""This byte stands for 0, since the instructions multiply unsigned activations with signed weights."""
_MAX = 127 * 257
"""The greatest activation, so that 256 · high + low has both bytes between -128 and 127."""
_TINY = 1e-30


class IntegerProduct(Product):
    """A large int8 weight with float32 activations, within 2 ** -16 of the row's largest activation."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape, bias, weight.nbytes)
        self._packed = torch.ops.onednn.qlinear_prepack(weight.values, None)
        self._scale = weight.scale.flatten()
        self._zero = torch.zeros(self.out_features, dtype=torch.int64)

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = len(x)
        unit = x.abs().amax(dim=1, keepdim=True).clamp_(min=_TINY).mul_(1 / _MAX)  # [T, 1]
        # both bytes at once: ... + 128 · 256 + 128, and half for rounding
        codes = (x / unit).add_(_ZERO * 257 + 0.5).to(torch.int32)
        low_high = codes.view(torch.uint8).view(num_rows, -1, 4)[..., :2]  # of little-endian numbers
        bytes_ = low_high.permute(2, 0, 1).reshape(2 * num_rows, -1)
        y = _product(bytes_, self._packed, self._scale, self._zero)
        return self._biased(torch.add(y[:num_rows], y[num_rows:], alpha=256).mul_(unit))


@functools.cache
def is_exact() -> bool:
    """Whether this machine multiplies bytes without losing any of it; instructions before VNNI saturate."""
    if not torch._C._has_mkldnn or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    bytes_ = torch.tensor([[255], [0]], dtype=torch.uint8).repeat(1, 256)
    weight = torch.full((64, 256), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    found = _product(bytes_, packed, torch.ones(64), torch.zeros(64, dtype=torch.int64))
    wanted = torch.tensor([[127.0], [-128.0]]) * (127 * 256)
    return torch.equal(found, wanted.expand(2, 64))


def _product(bytes_: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """[T, in] uint8 about 128 → [T, out] float32: sums of integers times the scale of each output."""
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        bytes_, 1.0, _ZERO, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y
