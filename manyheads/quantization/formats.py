"""Checkpoints that are quantized already: what `quantization_config` in config.json says, and how their tensors read.

| `quantization_config` | scheme | file |
|---|---|---|
| compressed-tensors: int-quantized, float-quantized | int8, fp8 | `compressed_tensors.py` |
| compressed-tensors: pack-quantized | int4, int8 | `compressed_tensors.py` |
| fp8, a scale per tensor or per row | fp8 | `compressed_tensors.py` |
| awq (gemm) | int4 | `awq_gptq.py` |
| gptq (formats gptq and gptq_v2) without desc_act | int4 | `awq_gptq.py` |
| mxfp4 | none: widened as it is loaded | `mxfp4.py` |
| gguf, which `manyheads.gguf` writes | int4, or none: blocks as they are | `gguf.py` |

A module is quantized if its tensors are: lists such as `ignore` or `modules_to_not_convert` say the same a second time,
and what they leave out has a plain `weight`. Only weights are in few bits here; activations stay in the model's type,
so what a checkpoint says of rounding them (`input_activations`, `input_scale`) is read and not needed.
"""

from __future__ import annotations

from pathlib import Path

from manyheads.checkpoint import read_json
from manyheads.config import ConfigError
from manyheads.quantization.awq_gptq import awq, gptq
from manyheads.quantization.compressed_tensors import compressed_tensors, fp8
from manyheads.quantization.gguf import gguf
from manyheads.quantization.parts import Format


def read_format(folder: Path) -> Format | None:
    """The format that config.json names, None for floating point. Raises ConfigError, saying what is supported."""
    path = folder / "config.json"
    raw = read_json(path)
    config = raw.get("quantization_config") or raw.get("compression_config")
    if not config:
        return None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: quantization_config must be an object, not {config!r}")
    readers = {"compressed-tensors": compressed_tensors, "fp8": fp8, "awq": awq, "gptq": gptq, "gguf": gguf}
    method = config.get("quant_method")
    if method == "mxfp4":
        return None  # its tensors have names of their own, which families declare (`models/parameters.Stacked`)
    if method not in readers:
        raise ConfigError(
            f"{path}: quant_method {method!r} is not supported; supported are {', '.join(readers)} and mxfp4"
        )
    return readers[method](path, config)
