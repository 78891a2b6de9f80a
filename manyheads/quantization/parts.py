"""What formats of quantized checkpoints are written with: settings and tensors, checked as they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.config import CheckpointError, ConfigError
from manyheads.quantization.base import CodedScheme, QuantizedWeight


class Parts:
    """The tensors of one module, by the last part of their keys; every one that is taken is checked."""

    def __init__(self, where: str, tensors: dict[str, Tensor]) -> None:
        self.where, self.tensors = where, tensors

    def take(self, leaf: str, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]) -> Tensor:
        """A tensor of one of these types and shapes. Raises CheckpointError where it is missing or has others."""
        tensor = self.tensors.get(leaf)
        if tensor is None:
            raise CheckpointError(f"{self.where}.{leaf} is missing")
        found = tuple(tensor.shape)
        if tensor.dtype not in dtypes or found not in shapes:
            dtype, *wanted = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
            raise CheckpointError(
                f"{self.where}.{leaf} is {dtype} {found}, not {' or '.join(wanted)} {' or '.join(map(str, shapes))}"
            )
        return tensor

    def scale(self, leaf: str, *shapes: tuple[int, ...]) -> Tensor:
        """A tensor of finite scales, as float32. Raises what `take` does."""
        tensor = self.take(leaf, (torch.float16, torch.bfloat16, torch.float32), *shapes).float()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self.where}.{leaf} holds values that are not finite")
        return tensor


@dataclass(frozen=True)
class Format:
    """How the modules of one checkpoint are quantized."""

    name: str
    scheme: CodedScheme | None
    """The scheme that its weights are in; None: they are in none, and most may be wide."""
    leaves: frozenset[str]
    """The last parts of a quantized module's keys."""
    convert: Callable[[Parts, int, int], QuantizedWeight]
    """It makes a weight of (tensors, out, in)."""
    can_be_widened: bool = False
    """Whether its tensors can be had in floating point instead (`checkpoint.read_tensors`), and be rounded anew."""

    def holds(self, leaf: str, tensor: Tensor) -> bool:
        """Whether a key of a linear module is a part of a quantized weight, and not a plain weight or bias."""
        return leaf in self.leaves and (leaf != "weight" or tensor.dtype in (torch.int8, torch.float8_e4m3fn))

    def read(self, where: str, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> QuantizedWeight:
        """The weight (out, in) of a module; raises CheckpointError naming the tensor that is missing or cannot hold.

        Args:
            where: file or folder and module, for messages.
            tensors: by the last part of their keys.
        """
        return self.convert(Parts(where, tensors), *shape)


_REQUIRED = ("format", "bits", "num_bits")


def expect(path: Path, config: dict[str, Any], key: str, *allowed: Any) -> Any:
    """The value of a key; raises ConfigError, naming what is supported, where it is none of these.

    The first of them is what it is where the key is missing, unless it is one that everything hangs on.
    """
    value = config.get(key, None if key in _REQUIRED else allowed[0])
    if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
        raise ConfigError(
            f"{path}: {key}={value!r} in quantization_config is not supported; "
            f"supported: {', '.join(map(repr, allowed))}"
        )
    return value
