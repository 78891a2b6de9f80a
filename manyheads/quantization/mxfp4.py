"""Weights in MXFP4 (OCP Microscaling Formats 1.0): 4 bits a number, and of 32 numbers in a row a power of two.

gpt-oss's checkpoints hold their experts so. Nothing here multiplies with it: weights are widened as they are loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
"""Numbers that share a scale."""
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes 0 to 7 (E2M1); the next eight are the same, negative."""
_BIAS = 127
"""A scale is 2 to the power of its byte less this (E8M0)."""


def widen(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What a weight stands for: [out, 32 · blocks].

    Args:
        blocks: [out, blocks, 16] uint8, of two neighbours the first in the lower half of a byte.
        scales: [out, blocks] uint8.
    """
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.float64, device=blocks.device)
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # [out, blocks, 32]
    scale = torch.exp2(scales.double() - _BIAS)
    return (values[codes.int()] * scale[..., None]).flatten(1).to(dtype)
