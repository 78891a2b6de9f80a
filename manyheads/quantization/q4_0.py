"""Matrices of GGUF files in Q4_0: groups of 32 columns with a scale, which are `int4` as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from manyheads.gguf.tensors import BLOCK, CODES, SCALES
from manyheads.quantization.int4 import INT4, Int4Weight
from manyheads.quantization.parts import Format, Parts


def q4_0(_path: Path, _config: dict[str, Any]) -> Format:
    """The format of such matrices, as `gguf.tensors.read` gives them."""

    def convert(parts: Parts, out: int, into: int) -> Int4Weight:
        codes = parts.take(CODES, (torch.uint8,), (out, into // 2))
        return Int4Weight(codes, parts.scale(SCALES, (out, into // BLOCK)))

    return Format("GGUF", INT4, frozenset({CODES, SCALES}), convert)
