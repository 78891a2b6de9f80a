"""AWQ and GPTQ checkpoints: weights [in, out] in 4 bits, eight to an int32; zero points and scales per group of inputs.

| | qweight | qzeros [groups, out / 8] |
|---|---|---|
| AWQ, gemm | [in, out / 8]: along the outputs, in the order 0 2 4 6 1 3 5 7 | the same order |
| GPTQ | [in / 8, out]: along the inputs, in order | in order; less 1 in format `gptq`, as they are in `gptq_v2` |

Both have `scales` [groups, out].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.config import CheckpointError, ConfigError
from manyheads.quantization.int4 import INT4, Int4Weight, pack, unpack
from manyheads.quantization.parts import Format, Parts, expect

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of eight that each nibble of a word holds, the lowest first."""


def awq(path: Path, config: dict[str, Any]) -> Format:
    """The format of AWQ checkpoints. Raises ConfigError for what is not supported."""
    expect(path, config, "bits", 4)
    expect(path, config, "version", "gemm", "GEMM")
    expect(path, config, "zero_point", True)
    size = _group_size(path, config)

    def convert(parts: Parts, out: int, into: int) -> Int4Weight:
        groups = _groups(parts, out, into, size)
        codes = _awq_columns(parts.take("qweight", (torch.int32,), (into, out // 8)))
        zeros = _awq_columns(parts.take("qzeros", (torch.int32,), (groups, out // 8)))
        scale = parts.scale("scales", (groups, out))
        return Int4Weight(pack(codes.T.contiguous()), scale.T.contiguous(), zeros.T.contiguous())

    return Format("AWQ", INT4, frozenset({"qweight", "qzeros", "scales"}), convert)


def gptq(path: Path, config: dict[str, Any]) -> Format:
    """The format of GPTQ checkpoints. Raises ConfigError for what is not supported."""
    expect(path, config, "bits", 4)
    form = expect(path, config, "checkpoint_format", "gptq", "gptq_v2")
    expect(path, config, "dynamic", None, {})
    expect(path, config, "pack_dtype", "int32")
    size = _group_size(path, config)
    # taken off whole words in `gptq`, where zero points of 0 borrow from their neighbours, and put back likewise
    offset = 0x11111111 if form == "gptq" else 0

    def convert(parts: Parts, out: int, into: int) -> Int4Weight:
        groups = _groups(parts, out, into, size)
        if "g_idx" in parts.tensors:
            order = parts.take("g_idx", (torch.int32, torch.int64), (into,))
            if not torch.equal(order.long(), torch.arange(into, device=order.device) // (into // groups)):
                raise CheckpointError(
                    f"{parts.where}.g_idx: columns in another order (desc_act) are not supported; "
                    "take a checkpoint that was made with desc_act=false"
                )
        # eight inputs to a word of one output: transposed, the bytes are as they should be
        values = parts.take("qweight", (torch.int32,), (into // 8, out)).T.contiguous().view(torch.uint8)
        zeros = unpack((parts.take("qzeros", (torch.int32,), (groups, out // 8)) + offset).view(torch.uint8))
        scale = parts.scale("scales", (groups, out))
        return Int4Weight(values, scale.T.contiguous(), zeros.T.contiguous())

    return Format("GPTQ", INT4, frozenset({"qweight", "qzeros", "scales", "g_idx"}), convert)


def _awq_columns(words: Tensor) -> Tensor:
    """[n, out / 8] int32 → [n, out] uint8."""
    nibbles = unpack(words.contiguous().view(torch.uint8)).view(len(words), -1, 8)
    columns = torch.empty_like(nibbles)
    columns[..., list(AWQ_ORDER)] = nibbles
    return columns.flatten(1)


def _group_size(path: Path, config: dict[str, Any]) -> int:
    size = config.get("group_size", 128)
    if not isinstance(size, int) or size == 0 or size < -1 or (size > 0 and size % 2):
        raise ConfigError(f"{path}: group_size={size!r} in quantization_config must be even, or -1 for all inputs")
    return size


def _groups(parts: Parts, out: int, into: int, size: int) -> int:
    size = into if size == -1 else size
    if into % size or into % 8 or out % 8:
        raise CheckpointError(f"{parts.where}: {into} inputs and {out} outputs come in no groups of {size} and 8")
    return into // size
