"""The tensors of a GGUF file under the names of our families: in the blocks that they are stored in, or widened.

| type of a matrix | comes as |
|---|---|
| Q4_0: blocks of 32 codes of 4 bits with a scale | the same codes and scales, which `int4` holds |
| Q4_1, Q4_K: with a minimum, too; Q8_0: of 8 bits with a scale | codes, scales and minima (`BlockWeight`) |
| any other that the package `gguf` can read | widened, exactly, and then rounded to the type that is asked for |

Matrices that are multiplied in one product stay in blocks only if all of them come in the same way.
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

CODES, SCALES, MINIMA = "codes", "scales", "minima"
"""The last parts of the keys of a weight in blocks: [out, in / 2] uint8 or [out, in] int8, and [out, in / 32]."""
FORMS = {"Q4_0": "int4", "Q4_1": "blocks of 4 bits", "Q4_K": "blocks of 4 bits", "Q8_0": "blocks of 8 bits"}
"""How types that stay in blocks come."""
BLOCK = 32
_IN_CONFIG = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are told by config.json (`architectures.py`)."""
_TOGETHER = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))
"""Modules of a layer that are multiplied in one product."""
_EMBEDDING = "token_embd.weight"
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def read(path: Path, widen: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every (key, tensor) of a file.

    Args:
        widen: nothing stays in blocks.

    Raises:
        ConfigError, CheckpointError: the file cannot be read, or holds a tensor that its architecture has no place for.
    """
    file = opened(path)
    record, kept = architecture_of(file), set() if widen else in_blocks(file)
    for tensor in file.tensors:
        if tensor.name in _IN_CONFIG:
            continue
        module, leaf = _key(file, tensor.name)
        data = tensor.data
        if record.turns_neighbours and module.endswith(("self_attn.q_proj", "self_attn.k_proj")):
            data = data[_halves_apart(file, tensor.name, len(data))]
        if tensor.name in kept:
            # the embedding is looked up, and may be the projection to the vocabulary as well, which is multiplied with
            target = "lm_head" if tensor.name == _EMBEDDING else module
            for part, values in blocks_of(tensor.tensor_type.name, torch.from_numpy(np.array(data))).items():
                yield f"{target}.{part}", values
            if tensor.name != _EMBEDDING:
                continue
        value = widened(path, tensor, data)
        if record.norm_offset and "norm" in module:
            value = value - np.float32(record.norm_offset)
        yield f"{module}.{leaf}", torch.from_numpy(value)


def in_blocks(file: GgufFile) -> set[str]:
    """Names of the matrices that are not widened."""
    forms = {tensor.name: FORMS.get(tensor.tensor_type.name) for tensor in file.tensors}
    kept = {name for name, form in forms.items() if form is not None}
    if "output.weight" in forms or forms.get(_EMBEDDING) == "int4":
        kept.discard(_EMBEDDING)
    for name in list(kept):
        at, _, module = name.removesuffix(".weight").rpartition(".")
        beside = next((names for names in _TOGETHER if module in names), ())
        if len({forms.get(f"{at}.{other}.weight") for other in beside}) > 1:
            kept.discard(name)
    return kept


def is_all_in_4_bits(file: GgufFile) -> bool:
    """Whether all matrices of layers come as `int4`."""
    layers = [tensor for tensor in file.tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1]
    return all(tensor.tensor_type.name == "Q4_0" for tensor in layers)


def described(path: Path, dtype: torch.dtype, is_rounded: bool, multiplies_blocks: bool) -> str:
    """What becomes of a file's matrices, in a line for who starts the server.

    Args:
        dtype: of activations.
        is_rounded: whether matrices are rounded once more, as a setting says.
        multiplies_blocks: whether the device multiplies what comes in blocks as it is.
    """
    file = opened(path)
    matrices = [tensor for tensor in file.tensors if len(tensor.shape) > 1]
    kept = set() if is_rounded else in_blocks(file)
    stay = {t.name for t in matrices if t.name in kept and (multiplies_blocks or t.tensor_type.name == "Q4_0")}
    to = f"widened to {str(dtype).removeprefix('torch.')}" + (" and rounded anew" if is_rounded else "")
    parts = [
        f"{', '.join(f'{count} in {kind}' for kind, count in sorted(counted.items()))} {what}"
        for what, counted in (
            ("stay as they are", Counter(t.tensor_type.name for t in matrices if t.name in stay)),
            (f"are {to}", Counter(t.tensor_type.name for t in matrices if t.name not in stay)),
        )
        if counted
    ]
    return f"matrices of {path.resolve().name}: {'; '.join(parts)}"


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


def blocks_of(kind: str, data: Tensor) -> dict[str, Tensor]:
    """The codes, scales and minima of a matrix, by the last parts of their keys.

    Args:
        kind: one of `FORMS`.
        data: [rows, bytes] uint8, as it is stored.
    """
    if kind == "Q4_K":
        return _super_blocks(data)
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    blocks = data.view(len(data), -1, size)
    parts = {SCALES: _half(blocks, 0)}
    if kind == "Q4_0":  # scale, then 16 bytes with a code of each half, less 8
        codes = torch.cat((blocks[..., 2:] & 15, blocks[..., 2:] >> 4), dim=-1).flatten(1)
        return parts | {CODES: codes[:, 0::2] | (codes[:, 1::2] << 4)}
    if kind == "Q4_1":  # scale, minimum, 16 bytes
        return parts | {MINIMA: _half(blocks, 2), CODES: blocks[..., 4:].flatten(1).contiguous()}
    return parts | {CODES: blocks[..., 2:].contiguous().view(torch.int8).flatten(1)}


def _super_blocks(data: Tensor) -> dict[str, Tensor]:
    """Q4_K: eight blocks with a scale of scales and a scale of minima, 6 bits for each of those, and pairs of blocks
    whose codes stand in the low and in the high halves of 32 bytes."""
    from gguf.quants import Q4_K

    blocks = data.view(len(data), -1, 144)
    scales, minima = (
        torch.from_numpy(part).view(*blocks.shape[:2], 8).float()
        for part in Q4_K.get_scale_min(blocks[..., 4:16].reshape(-1, 12).numpy())
    )
    pairs = blocks[..., 16:].reshape(*blocks.shape[:2], 4, BLOCK)
    codes = torch.stack((pairs & 15, pairs >> 4), dim=-2).view(*blocks.shape[:2], 8, 2, BLOCK // 2)
    return {
        SCALES: (_half(blocks, 0)[..., None].float() * scales).flatten(1),
        MINIMA: (-_half(blocks, 2)[..., None].float() * minima).flatten(1),
        CODES: (codes[..., 0, :] | (codes[..., 1, :] << 4)).flatten(1),
    }


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 number that stands somewhere in each block."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)
