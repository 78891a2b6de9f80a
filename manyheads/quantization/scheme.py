"""Rounding the weights of a model to what `quantization` in the configuration names."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.quantization import bitsandbytes
from manyheads.quantization.bitsandbytes import BitsandbytesWeight
from manyheads.quantization.weight import QuantizedWeight, quantize

Weight = Tensor | QuantizedWeight | BitsandbytesWeight


def compress(weight: Tensor, scheme: str | None) -> Weight:
    """A linear layer's weight [out, in] in a scheme; as it is without one.

    Raises:
        ConfigError: the scheme cannot hold the shape, or needs a library that is not there.
    """
    if scheme is None:
        return weight
    return bitsandbytes.quantize(weight, scheme) if scheme.startswith("bitsandbytes") else quantize(weight, scheme)


def compress_vocabulary(weight: Tensor, scheme: str | None) -> Weight:
    """A projection to the vocabulary [V, in]: int8 where the others have 4 bits, which it can bear less.

    bitsandbytes leaves it alone, as in transformers.
    """
    if scheme is not None and scheme.startswith("bitsandbytes"):
        return weight
    return compress(weight, "int8" if scheme == "int4" else scheme)


def join(parts: list[Weight]) -> Weight:
    """One weight for projections that read the same input.

    Raises:
        ValueError: they are not quantized alike.
    """
    if len(parts) == 1:
        return parts[0]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    kept = [part for part in parts if isinstance(part, BitsandbytesWeight)]
    if len(tensors) == len(parts):
        return torch.cat(tensors)
    if len(quantized) == len(parts):
        return QuantizedWeight.cat(quantized)
    if len(kept) == len(parts):
        return BitsandbytesWeight.cat(kept)
    raise ValueError("some are quantized and some are not")
