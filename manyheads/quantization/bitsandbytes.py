"""Weights that the bitsandbytes library keeps and multiplies with: LLM.int8() and 4-bit NormalFloat.

They are here for comparison, and for who knows them from transformers. The library leaves projections to the vocabulary
in floating point, as in transformers. NOTE: LLM.int8() chooses the columns that it
multiplies in half precision from all rows of a call, so a reply depends on what else is in the batch, and on the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.config import ConfigError
from manyheads.quantization.base import QuantizedWeight, Scheme

THRESHOLD = 6.0
"""Columns of an input with a value beyond it are multiplied in half precision (Dettmers et al. 2022, section 3.2)."""


class BitsandbytesWeight(QuantizedWeight):
    """One or more of the library's modules that read the same input.

    Args:
        modules: Linear8bitLt or Linear4bit, without bias.
        shape: (out, in) of all.
    """

    def __init__(self, modules: Sequence[Any], shape: tuple[int, int]) -> None:
        self.modules, self._shape = list(modules), shape

    def __call__(self, x: Tensor) -> Tensor:
        """The library's own product: [T, in] → [T, out]."""
        parts = [module(x) for module in self.modules]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(module.weight) for module in self.modules)

    def part(self, dim: int, start: int, stop: int) -> BitsandbytesWeight:
        raise ConfigError("bitsandbytes cannot share its weights among ranks; take int8 or int4")

    @staticmethod
    def cat(parts: Sequence[BitsandbytesWeight]) -> BitsandbytesWeight:
        modules = [module for part in parts for module in part.modules]
        return BitsandbytesWeight(modules, (sum(part.shape[0] for part in parts), parts[0].shape[1]))


def load_library() -> Any:
    """The library. Raises ConfigError where it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(f"this quantization needs bitsandbytes ({error}): pip install bitsandbytes") from error
    return bitsandbytes


def quantize_8bit(weight: Tensor) -> BitsandbytesWeight:
    """Hand a weight [out, in] to LLM.int8(), with transformers' default threshold. Raises what `load_library` does."""
    nn = load_library().nn
    out, into = weight.shape
    module = nn.Linear8bitLt(into, out, bias=False, has_fp16_weights=False, threshold=THRESHOLD, device="meta")
    module.weight = nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    return _quantized(module, weight)


def quantize_4bit(weight: Tensor) -> BitsandbytesWeight:
    """Make a weight [out, in] nf4 in blocks of 64, as QLoRA has it.

    It raises ConfigError where the library is not installed, or cannot multiply with a weight of this shape.
    """
    nn = load_library().nn
    out, into = weight.shape
    if weight.device.type == "cpu" and out % 32:
        raise ConfigError(f"{BITSANDBYTES_4BIT} on a CPU needs weights whose rows come in groups of 32; one has {out}")
    kind = {"quant_type": "nf4", "compress_statistics": False}
    module = nn.Linear4bit(into, out, bias=False, compute_dtype=weight.dtype, device="meta", **kind)
    module.weight = nn.Params4bit(weight.cpu(), requires_grad=False, module=module, **kind)
    return _quantized(module, weight)


def _quantized(module: Any, weight: Tensor) -> BitsandbytesWeight:
    """The library quantizes what moves to a device."""
    out, into = weight.shape
    return BitsandbytesWeight([module.to(weight.device).eval()], (out, into))


def _nbytes(weight: Any) -> int:
    """Bytes of the library's parameter and its scales: one per row in 8 bits, where it may have moved them on, or per
    block in 4 bits."""
    state = getattr(weight, "quant_state", None)
    return int(weight.nbytes) + (int(state.absmax.nbytes) if state is not None else 4 * len(weight))


BITSANDBYTES_8BIT = Scheme(name="bitsandbytes-8bit", quantize=quantize_8bit, vocabulary=None, number_bytes=1.0)
BITSANDBYTES_4BIT = Scheme(name="bitsandbytes-4bit", quantize=quantize_4bit, vocabulary=None, number_bytes=0.57)
