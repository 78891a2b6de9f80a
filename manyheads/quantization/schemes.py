"""Every scheme by its name, and what a model does with weights in them: round, join, read in another order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyheads.config import ConfigError
from manyheads.quantization.base import CodedWeight, QuantizedWeight, Scheme, Weight
from manyheads.quantization.bitsandbytes import BITSANDBYTES_4BIT, BITSANDBYTES_8BIT
from manyheads.quantization.blocks import BlockWeight
from manyheads.quantization.fp8 import FP8
from manyheads.quantization.int4 import INT4
from manyheads.quantization.int8 import INT8

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (INT8, FP8, INT4, BITSANDBYTES_8BIT, BITSANDBYTES_4BIT)}


def find(name: str | None) -> Scheme | None:
    """The scheme that a setting names, one of `config.QUANTIZATIONS`; None where it names none."""
    return None if name in (None, "none") else SCHEMES[name]


def for_vocabulary(scheme: Scheme | None) -> Scheme | None:
    """The scheme of projections to the vocabulary in a model whose layers are in this one."""
    return None if scheme is None else find(scheme.vocabulary)


def compress(weight: Tensor, scheme: Scheme | None) -> Weight:
    """A linear layer's weight [out, in] in a scheme, as it is without one; raises what `Scheme.quantize` does."""
    return weight if scheme is None else scheme.quantize(weight)


def compress_vocabulary(weight: Tensor, scheme: Scheme | None) -> Weight:
    """A projection to the vocabulary [V, in] of a model whose layers are in a scheme; raises what `compress` does."""
    return compress(weight, for_vocabulary(scheme))


def join(parts: Sequence[Weight]) -> Weight:
    """One weight for projections that read the same input; raises ValueError where they are not quantized alike."""
    if len(parts) == 1:
        return parts[0]
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    if not quantized:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    if len(quantized) < len(parts):
        raise ValueError("some are quantized and some are not")
    return quantized[0].cat(quantized)


def reorder(weight: Weight, order: Tensor) -> Weight:
    """A weight [out, in] with its rows in another order [out] int64; raises ConfigError where its form has no rows."""
    if isinstance(weight, CodedWeight | BlockWeight):
        return weight.rows(order)
    if isinstance(weight, Tensor):
        return weight[order]
    raise ConfigError(f"{type(weight).__name__}: a model whose heads are read in another order cannot be kept so")
