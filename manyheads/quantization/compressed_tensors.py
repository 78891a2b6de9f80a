"""Checkpoints of the compressed-tensors format (llm-compressor, vLLM), and plain fp8 ones.

A module has `weight` in 8 bits and `weight_scale`, per row or for all; or `weight_packed` [out, in · bits / 32] int32,
the columns in order from the lowest bits on, offset so that codes are not negative, with `weight_scale` [out, groups],
`weight_shape`, and in the asymmetric form `weight_zero_point` [out · bits / 32, groups], packed along the rows.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.config import CheckpointError, ConfigError
from manyheads.quantization.base import CodedWeight
from manyheads.quantization.fp8 import FP8, Fp8Weight
from manyheads.quantization.int4 import INT4, Int4Weight, unpack
from manyheads.quantization.int8 import INT8, Int8Weight
from manyheads.quantization.parts import Format, Parts, expect

_UNUSED = frozenset({"input_scale", "input_zero_point"})


def compressed_tensors(path: Path, config: dict[str, Any]) -> Format:
    """The format of llm-compressor's checkpoints. Raises ConfigError for what is not supported."""
    layout = expect(path, config, "format", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
    expect(path, config, "quantization_status", "compressed", "frozen")
    expect(path, config, "kv_cache_scheme", None, {})
    expect(path, config, "transform_config", None, {})
    expect(path, {"format": "dense"} | (config.get("sparsity_config") or {}), "format", "dense")
    groups = config.get("config_groups") or {}
    if len(groups) != 1:
        raise ConfigError(f"{path}: config_groups in quantization_config must be one group, not {len(groups)}")
    (group,) = groups.values()
    expect(path, group, "targets", ["Linear"])
    expect(path, group, "output_activations", None)
    expect(path, group, "format", None, layout)
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise ConfigError(f"{path}: config_groups in quantization_config say nothing of weights")
    expect(path, weights, "dynamic", False)
    expect(path, weights, "actorder", None, False, "weight", "static")
    kind = expect(path, weights, "type", "int", "float")
    if layout == "pack-quantized":
        expect(path, weights, "type", "int")
        return _packed(path, weights, expect(path, weights, "num_bits", 4, 8))
    expect(path, weights, "type", {"int-quantized": "int", "float-quantized": "float"}.get(layout, kind))
    expect(path, weights, "num_bits", 8)
    expect(path, weights, "symmetric", True)
    expect(path, weights, "strategy", "tensor", "channel")
    scheme, form = (INT8, Int8Weight) if kind == "int" else (FP8, Fp8Weight)
    return Format(f"compressed-tensors {layout}", scheme, _UNUSED | {"weight", "weight_scale"}, partial(_eight, form))


def fp8(path: Path, config: dict[str, Any]) -> Format:
    """`quant_method: fp8`, as vLLM and transformers know it. Raises ConfigError for what is not supported."""
    if config.get("weight_block_size") is not None:
        raise ConfigError(
            f"{path}: weight_block_size={config['weight_block_size']!r} (fp8 with a scale per block) is not supported; "
            "supported are scales per tensor and per row"
        )
    expect(path, config, "activation_scheme", "dynamic", "static")
    leaves = {"weight", "weight_scale", "weight_scale_inv", "activation_scale"}
    return Format("fp8", FP8, _UNUSED | leaves, partial(_eight, Fp8Weight))


def _eight(form: type[CodedWeight], parts: Parts, out: int, into: int) -> CodedWeight:
    values = parts.take("weight", (form.dtype,), (out, into))
    # both names mean a factor: "inv" is seen from the float weight
    names = [leaf for leaf in ("weight_scale", "weight_scale_inv") if leaf in parts.tensors]
    if len(names) == 2:
        raise CheckpointError(f"{parts.where}: both weight_scale and weight_scale_inv are there")
    scale = parts.scale(names[0] if names else "weight_scale", (out, 1), (out,), (1,), (), (1, 1))
    if form.dtype.is_floating_point and not torch.isfinite(values.float()).all():
        raise CheckpointError(f"{parts.where}.weight holds values that are not finite")
    return form(values, scale.reshape(-1, 1).expand(out, 1).contiguous())


def _packed(path: Path, weights: dict[str, Any], bits: int) -> Format:
    symmetric = expect(path, weights, "symmetric", True, *([False] if bits == 4 else []))
    strategy = expect(path, weights, "strategy", "channel", *(["group"] if bits == 4 else []))
    size = weights.get("group_size") if strategy == "group" else None
    if strategy == "group" and (not isinstance(size, int) or size < 2 or size % 2):
        raise ConfigError(f"{path}: group_size={size!r} in quantization_config must be an even number")

    def convert(parts: Parts, out: int, into: int) -> CodedWeight:
        shape = parts.take("weight_shape", (torch.int64, torch.int32), (2,))
        if shape.tolist() != [out, into]:
            raise CheckpointError(f"{parts.where}.weight_shape says {shape.tolist()}, not {[out, into]}")
        per_word = 32 // bits
        if into % (size or 1) or into % per_word:
            raise CheckpointError(f"{parts.where}: {into} columns come in no groups of {size or per_word}")
        groups = into // size if size else 1
        packed = parts.take("weight_packed", (torch.int32,), (out, into // per_word)).contiguous().view(torch.uint8)
        scale = parts.scale("weight_scale", (out, groups), *([(out,)] if groups == 1 else [])).reshape(out, groups)
        if bits == 8:
            return Int8Weight((packed ^ 0x80).view(torch.int8), scale)
        zero: Tensor | None = None
        if not symmetric:
            words = parts.take("weight_zero_point", (torch.int32,), (-(-out // 8), groups))
            zero = unpack(words.T.contiguous().view(torch.uint8))[:, :out].T.contiguous()
        return Int4Weight(packed, scale, zero)

    leaves = _UNUSED | {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"}
    return Format("compressed-tensors pack-quantized", INT4 if bits == 4 else INT8, leaves, convert)
