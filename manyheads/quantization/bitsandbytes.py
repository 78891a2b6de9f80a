"""Weights that the bitsandbytes library keeps and multiplies with: LLM.int8() and 4-bit NormalFloat.

They are here for comparison, and for who knows them from transformers. NOTE: LLM.int8() chooses the columns that it
multiplies in half precision from all rows of a call, so a reply depends on what else is in the batch, and on the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.config import ConfigError

THRESHOLD = 6.0
"""Columns of an input with a value beyond it are multiplied in half precision (Dettmers et al. 2022, section 3.2)."""


class BitsandbytesWeight:
    """One or more of the library's modules that read the same input.

    Args:
        modules: Linear8bitLt or Linear4bit, without bias.
        shape: (out, in) of all.
    """

    def __init__(self, modules: Sequence[Any], shape: tuple[int, int]) -> None:
        self.modules, self.shape = list(modules), shape

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] → [T, out]."""
        parts = [module(x) for module in self.modules]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(module.weight) for module in self.modules)

    @staticmethod
    def cat(parts: Sequence[BitsandbytesWeight]) -> BitsandbytesWeight:
        """One weight for projections that read the same input."""
        modules = [module for part in parts for module in part.modules]
        return BitsandbytesWeight(modules, (sum(part.shape[0] for part in parts), parts[0].shape[1]))


def load_library() -> Any:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(f"this quantization needs bitsandbytes ({error}): pip install bitsandbytes") from error
    return bitsandbytes


def quantize(weight: Tensor, scheme: str) -> BitsandbytesWeight:
    """Hand a weight to the library.

    Args:
        weight: [out, in] on its device.
        scheme: `bitsandbytes-8bit` (LLM.int8() with transformers' default threshold) or `bitsandbytes-4bit` (nf4 in
            blocks of 64, as QLoRA has it).

    Raises:
        ConfigError: the library is not installed, or cannot multiply with a weight of this shape.
    """
    nn = load_library().nn
    out, into = weight.shape
    if scheme == "bitsandbytes-4bit" and weight.device.type == "cpu" and out % 32:
        raise ConfigError(f"{scheme} on a CPU needs weights whose rows come in groups of 32; one has {out}")
    if scheme == "bitsandbytes-8bit":
        module = nn.Linear8bitLt(into, out, bias=False, has_fp16_weights=False, threshold=THRESHOLD, device="meta")
        module.weight = nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        kind = {"quant_type": "nf4", "compress_statistics": False}
        module = nn.Linear4bit(into, out, bias=False, compute_dtype=weight.dtype, device="meta", **kind)
        module.weight = nn.Params4bit(weight.cpu(), requires_grad=False, module=module, **kind)
    # the library quantizes what moves to a device
    return BitsandbytesWeight([module.to(weight.device).eval()], (out, into))


def _nbytes(weight: Any) -> int:
    """Bytes of the library's parameter and its scales: one per row in 8 bits, where it may have moved them on, or per
    block in 4 bits."""
    state = getattr(weight, "quant_state", None)
    return int(weight.nbytes) + (int(state.absmax.nbytes) if state is not None else 4 * len(weight))
