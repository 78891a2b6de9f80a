"""Checkpoints that are quantized already: what `quantization_config` in config.json says, and how their tensors read.

| `quantization_config` | scheme | file |
|---|---|---|
| compressed-tensors: int-quantized, float-quantized | int8, fp8 | `compressed_tensors.py` |
| compressed-tensors: pack-quantized | int4, int8 | `compressed_tensors.py` |
| fp8, a scale per tensor or per row | fp8 | `compressed_tensors.py` |
| awq (gemm) | int4 | `int4.py` |
| gptq (formats gptq and gptq_v2) without desc_act | int4 | `int4.py` |

A module is quantized if its tensors are: lists such as `ignore` or `modules_to_not_convert` say the same a second time,
and what they leave out has a plain `weight`. Only weights are in few bits here; activations stay in the model's type,
so what a checkpoint says of rounding them (`input_activations`, `input_scale`) is read and not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.checkpoint import read_json
from manyheads.config import CheckpointError, ConfigError
from manyheads.quantization.weight import QuantizedWeight


class Parts:
    """The tensors of one module, by the last part of their keys; every one that is taken is checked."""

    def __init__(self, where: str, tensors: dict[str, Tensor]) -> None:
        self.where, self.tensors = where, tensors

    def take(self, leaf: str, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]) -> Tensor:
        """A tensor of one of these types and shapes.

        Raises:
            CheckpointError: it is missing or has others.
        """
        tensor = self.tensors.get(leaf)
        if tensor is None:
            raise CheckpointError(f"{self.where}.{leaf} is missing")
        if tensor.dtype not in dtypes or tuple(tensor.shape) not in shapes:
            types = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CheckpointError(
                f"{self.where}.{leaf} is {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}, "
                f"not {types} {' or '.join(map(str, shapes))}"
            )
        return tensor

    def scale(self, leaf: str, *shapes: tuple[int, ...]) -> Tensor:
        """Scales, as float32.

        Raises:
            CheckpointError: also where they are not finite.
        """
        tensor = self.take(leaf, (torch.float16, torch.bfloat16, torch.float32), *shapes).float()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self.where}.{leaf} holds values that are not finite")
        return tensor


@dataclass(frozen=True)
class Format:
    """How the modules of one checkpoint are quantized."""

    name: str
    scheme: str
    leaves: frozenset[str]
    """Last parts of a quantized module's keys."""
    convert: Callable[[Parts, int, int], QuantizedWeight]
    """(tensors, out, in) → weight."""

    def holds(self, leaf: str, tensor: Tensor) -> bool:
        """Whether a key of a linear module is a part of a quantized weight, and not a plain weight or bias."""
        return leaf in self.leaves and (leaf != "weight" or tensor.dtype in (torch.int8, torch.float8_e4m3fn))

    def read(self, where: str, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> QuantizedWeight:
        """The weight of a module.

        Args:
            where: file or folder and module, for messages.
            tensors: by the last part of their keys.
            shape: (out, in).

        Raises:
            CheckpointError: naming the tensor that is missing or cannot hold.
        """
        return self.convert(Parts(where, tensors), *shape)


def read_format(folder: Path) -> Format | None:
    """What config.json says; None for a checkpoint in floating point.

    Raises:
        ConfigError: it is not supported; the message says what is.
    """
    from manyheads.quantization import compressed_tensors, int4

    path = folder / "config.json"
    raw = read_json(path)
    config = raw.get("quantization_config") or raw.get("compression_config")
    if not config:
        return None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: quantization_config must be an object, not {config!r}")
    readers: dict[str, Callable[[Path, dict[str, Any]], Format]] = {
        "compressed-tensors": compressed_tensors.compressed_tensors,
        "fp8": compressed_tensors.fp8,
        "awq": int4.awq,
        "gptq": int4.gptq,
    }
    method = config.get("quant_method")
    if method not in readers:
        raise ConfigError(f"{path}: quant_method {method!r} is not supported; supported are {', '.join(readers)}")
    return readers[method](path, config)


_REQUIRED = ("format", "bits", "num_bits")


def expect(path: Path, config: dict[str, Any], key: str, *allowed: Any) -> Any:
    """The value of a key, which must be one of these.

    The first of them is what it is where the key is missing, unless it is one that everything hangs on.

    Raises:
        ConfigError: naming the key, the value and what is supported.
    """
    value = config.get(key, None if key in _REQUIRED else allowed[0])
    if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
        raise ConfigError(
            f"{path}: {key}={value!r} in quantization_config is not supported; "
            f"supported: {', '.join(map(repr, allowed))}"
        )
    return value
