"""Products with weights in blocks, widened in registers by `native/blocks.c`: torch has none in float32 that is quick.

Rows of activations stay in float32, so what comes out is what the widened weight gives, read as a sixth of its
bytes. Without a compiler weights are widened when they are loaded.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.native.library import load
from manyheads.native.memory import WEIGHTS
from manyheads.ops.base import Product
from manyheads.quantization.blocks import BLOCK, BlockWeight

LANES = 16
"""Outputs that a vector of the processor holds."""


class BlockProduct(Product):
    """A weight in blocks with float32 activations.

    Args:
        multiply: the function of `blocks.c`, if not the one of `library`.
    """

    def __init__(
        self, weight: BlockWeight, bias: Tensor | None, multiply: ctypes._NamedFuncPointer | None = None
    ) -> None:
        packed, are_halves = arranged(weight)
        super().__init__(weight.shape, bias, packed.nbytes)
        multiply = multiply or library()
        assert multiply is not None
        self._multiply = multiply
        self._packed = WEIGHTS.placed(packed)
        self._sizes = 8 if weight.minimum is None else 4, are_halves, self.out_features, self.in_features

    def __call__(self, x: Tensor) -> Tensor:
        x, y = x.contiguous(), x.new_empty(len(x), self.out_features)
        self._multiply(x.data_ptr(), self._packed.data_ptr(), y.data_ptr(), len(x), *self._sizes)
        return self._biased(y)


def arranged(weight: BlockWeight) -> tuple[Tensor, bool]:
    """A weight in the order of `blocks.c`, [tiles, in / 32, bytes] uint8, and whether scales and minima are in float16:
    they are if all of them are such numbers. A tile is 16 outputs; the last one is padded with zeros."""
    rows, blocks = weight.scale.shape
    codes, numbers = weight.codes.view(torch.uint8).view(rows, blocks, -1), [weight.scale]
    if weight.minimum is not None:  # the codes of two neighbours in a byte, less 8
        codes, numbers = torch.cat((codes & 15, codes >> 4), dim=-1) ^ 8, [weight.scale, weight.minimum]
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    are_halves = all(torch.equal(part.half().float(), part) for part in numbers)
    if are_halves:
        numbers = [part.half() for part in numbers]
    # [out, in / 32, words, bytes]: an output's parts, which stand beside those of the 15 others
    parts = [codes.view(rows, blocks, -1, 4), *(part[..., None, None].view(torch.uint8) for part in numbers)]
    padding = (0, 0, 0, 0, 0, 0, 0, -rows % LANES)
    tiled = (F.pad(part, padding).view(-1, LANES, *part.shape[1:]).permute(0, 2, 3, 1, 4).flatten(2) for part in parts)
    return torch.cat(list(tiled), dim=-1), are_halves


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights in blocks are multiplied as they are."""
    return dtype == torch.float32 and device.type == "cpu" and library() is not None


@functools.cache
def library() -> ctypes._NamedFuncPointer | None:
    """The function of `blocks.c`; None where it cannot be compiled.

    It is tried before it is used: what a compiler made that does not compute what torch does is not taken.
    """
    loaded = load("blocks.c")
    if loaded is None:
        return None
    function = loaded.manyheads_blocks
    function.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int, c_int64, c_int64]
    function.restype = None
    return function if _is_right(function) else None


def _is_right(function: ctypes._NamedFuncPointer) -> bool:
    """Compare a product of each kind with torch's."""
    x = torch.arange(9 * 2 * BLOCK, dtype=torch.float32).sin_().view(9, -1)
    scale = torch.arange(1.0, 7.0).view(3, 2)
    codes = torch.arange(3 * 2 * BLOCK, dtype=torch.int8).view(3, -1)
    in_bytes, in_halves = codes, codes[:, :BLOCK].view(torch.uint8).contiguous() * 7
    for weight in (
        BlockWeight(in_bytes, scale, None),
        BlockWeight(in_halves, scale, scale - 5),
        BlockWeight(in_halves, scale / 3, scale - 5),  # no float16 numbers
    ):
        product, wanted = BlockProduct(weight, None, function), x @ weight.dequantize(torch.float32).T
        if not torch.allclose(product(x), wanted, rtol=1e-4, atol=float(wanted.abs().max()) * 1e-5):
            return False
    return True
