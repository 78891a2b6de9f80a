"""Matrices of GGUF files that are not widened as they are read (`manyheads/gguf/tensors.py`).

| type | becomes |
|---|---|
| Q4_0 | `int4`, in groups of 32 columns |
| Q4_1, Q4_K, Q8_0 | `BlockWeight` |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from manyheads.gguf.tensors import CODES, MINIMA, SCALES
from manyheads.quantization.base import QuantizedWeight
from manyheads.quantization.blocks import BLOCK, BlockWeight
from manyheads.quantization.int4 import INT4, Int4Weight
from manyheads.quantization.parts import Format, Parts


def gguf(_path: Path, config: dict[str, Any]) -> Format:
    """The format of such files; `bits` says that all layers are in Q4_0."""
    scheme = INT4 if config.get("bits") == 4 else None
    return Format("GGUF", scheme, frozenset({CODES, SCALES, MINIMA}), _convert, can_be_widened=True)


def _convert(parts: Parts, out: int, into: int) -> QuantizedWeight:
    codes = parts.take(CODES, (torch.uint8, torch.int8), (out, into // 2), (out, into))
    scale = parts.scale(SCALES, (out, into // BLOCK))
    if codes.dtype == torch.int8:
        return BlockWeight(codes, scale, None)
    if MINIMA in parts.tensors:
        return BlockWeight(codes, scale, parts.scale(MINIMA, (out, into // BLOCK)))
    return Int4Weight(codes, scale)
