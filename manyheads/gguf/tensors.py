"""The tensors of a GGUF file under the names of our families, widened, or in 4 bits where nothing is lost by it.

| type of a matrix | comes as |
|---|---|
| Q4_0: blocks of 32 codes of 4 bits with a scale | the same codes and scales (`int4`), if all of a product are |
| any other that the package `gguf` can read | widened, exactly, and then rounded to the type that is asked for |

Blocks of other types have minima that are no multiples of their scales (Q4_1, Q4_K, Q5_K), or scales of 16 or 32 codes
of 8 bits (Q6_K, Q8_0), for which `int4` and `int8` have no place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyheads.config import CheckpointError
from manyheads.gguf.architectures import architecture_of
from manyheads.gguf.file import GgufFile, opened, widened

CODES, SCALES = "codes", "scales"
"""The last parts of the keys of a weight that comes in 4 bits: [out, in / 2] uint8 as in `int4`, and [out, in / 32]."""
BLOCK = 32
"""Columns that share a scale in Q4_0."""
_IN_CONFIG = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are told by config.json (`architectures.py`)."""
_TOGETHER = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))
"""Modules of a layer that are multiplied in one product."""
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def read(path: Path, widen: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every (key, tensor) of a file.

    Args:
        widen: nothing stays in 4 bits.

    Raises:
        ConfigError, CheckpointError: the file cannot be read, or holds a tensor that its architecture has no place for.
    """
    file = opened(path)
    record, kept = architecture_of(file), set() if widen else kept_in_4_bits(file)
    for tensor in file.tensors:
        if tensor.name in _IN_CONFIG:
            continue
        module, leaf = _key(file, tensor.name)
        data = tensor.data
        if record.turns_neighbours and module.endswith(("self_attn.q_proj", "self_attn.k_proj")):
            data = data[_halves_apart(file, tensor.name, len(data))]
        if tensor.name in kept:
            codes, scales = _in_4_bits(data)
            yield f"{module}.{CODES}", codes
            yield f"{module}.{SCALES}", scales
            continue
        value = widened(path, tensor, data)
        if record.norm_offset and "norm" in module:
            value = value - np.float32(record.norm_offset)
        yield f"{module}.{leaf}", torch.from_numpy(value)


def kept_in_4_bits(file: GgufFile) -> set[str]:
    """Names of the matrices that are not widened: those in Q4_0, where all that they are multiplied with are."""
    kinds = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    kept = {name for name, kind in kinds.items() if kind == "Q4_0" and name != "token_embd.weight"}
    for name in list(kept):
        at, _, module = name.removesuffix(".weight").rpartition(".")
        beside = next((names for names in _TOGETHER if module in names), ())
        if any(kinds.get(f"{at}.{other}.weight", "Q4_0") != "Q4_0" for other in beside):
            kept.discard(name)
    return kept


def described(path: Path, dtype: torch.dtype, is_rounded: bool) -> str:
    """What becomes of a file's matrices, in a line for who starts the server.

    Args:
        dtype: of activations.
        is_rounded: whether matrices are rounded once more, as a setting says.
    """
    file = opened(path)
    kept = kept_in_4_bits(file)
    matrices = [tensor for tensor in file.tensors if len(tensor.shape) > 1]
    wide = Counter(tensor.tensor_type.name for tensor in matrices if tensor.name not in kept)
    parts = [f"{len(kept)} matrices in Q4_0 stay in 4 bits (int4)"] if kept else []
    if wide:
        said = ", ".join(f"{count} in {kind}" for kind, count in sorted(wide.items()))
        to = "widened and rounded anew" if is_rounded else f"widened to {str(dtype).removeprefix('torch.')}"
        parts.append(f"{said} are {to}")
    return f"{path.resolve().name}: {'; '.join(parts)}"


def _key(file: GgufFile, name: str) -> tuple[str, str]:
    """The module of a family, and the last part of a tensor's key."""
    at, _, leaf = name.rpartition(".")
    modules = architecture_of(file).modules
    if at in _TOP:
        return _TOP[at], leaf
    match at.split("."):
        case ["blk", number, module] if number.isdigit() and module in modules:
            return f"model.layers.{number}.{modules[module]}", leaf
    raise CheckpointError(f"{file.path}: tensor {name} belongs to no parameter of a {file.architecture}")


def _halves_apart(file: GgufFile, name: str, rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where the rows of queries or keys are, by where the family has them: each head's first half, then its second."""
    heads = file.number("attention.head_count", int)
    if ".attn_k." in name:
        heads = file.number("attention.head_count_kv", int, heads)
    if rows % (2 * heads):
        raise CheckpointError(f"{file.path}: {name} has {rows} rows for {heads} heads")
    places: np.ndarray[Any, np.dtype[np.int64]] = np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).flatten()
    return places


def _in_4_bits(data: Any) -> tuple[Tensor, Tensor]:
    """Blocks of Q4_0, [rows, bytes]: two bytes of a float16 scale, then 16 with a code of each half → codes, scales.

    A number is (code − 8) · scale.
    """
    blocks = torch.from_numpy(np.array(data)).view(len(data), -1, 2 + BLOCK // 2)
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    halves = blocks[..., 2:]
    codes = torch.cat((halves & 15, halves >> 4), dim=-1).flatten(1)  # [rows, columns]
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scales
