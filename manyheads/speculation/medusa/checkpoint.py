"""Medusa heads on disk, read in every format that is in use (export.py writes them). Formats are told apart by keys.

| format | keys |
|---|---|
| reference v0.1, TGI "V1" | `{h}.{l}.linear.weight`, `{h}.{l}.linear.bias`, `{h}.{L}.weight` |
| reference v1.0 (base included) | `medusa_head.` + the same |
| TGI "V2" (the base's vocabulary projection is shared) | `{h}.{l}.linear.weight`, `{h}.{l}.linear.bias` |
| vLLM | `blocks.{h}.layers.{l}.weight` (`.bias`), `lm_heads.{h}.weight` or `lm_head.weight`, `token_map` or not |
| manyheads | vLLM's; with `shares_base_lm_head` in config.json they need no projection of their own |

The reference builds `[ResBlock] * L`, so the L blocks of its heads are one module saved L times; as saved they are
loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from manyheads.checkpoint import named_base, read_json, read_tensors, resolve, tensor_files
from manyheads.config import CheckpointError, ConfigError
from manyheads.models.config import ModelConfig

HEAD_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
HYDRA_FILE = "hydra_lm_head.pt"
STATISTICS = "tree_statistics.json"

_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_PROJECTION = re.compile(r"(\d+)\.(\d+)\.weight")
_VLLM_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
_VLLM_PROJECTION = re.compile(r"lm_heads\.(\d+)\.weight")


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """H heads of L residual blocks."""

    blocks: list[list[tuple[Tensor, Tensor]]]
    """[head][block]: weight [hidden, hidden] and bias [hidden]."""
    projections: list[Tensor] | None
    """[head]: [V, hidden]; None where the heads share the base's."""
    token_map: Tensor | None
    """[truncated V] int64, the token that each row of a projection stands for."""
    format: str
    accuracy: list[list[float]] | None
    """[head][rank] share of right candidates, where the checkpoint brings it."""

    @property
    def shares_one_projection(self) -> bool:
        """Whether several heads have the same projection, which is not the base's."""
        own = self.projections or []
        return len(own) > 1 and all(projection is own[0] for projection in own)


def split_model(model: str, heads: str | None) -> tuple[Path, Path | None]:
    """Find the base model's folder and the heads' (None: no heads), which may be a drafter of another kind as well.

    `model` may be a base, a base with heads beside or inside it, or heads alone that name their base; `heads` wins.

    Raises:
        ConfigError, CheckpointError: neither is there.
    """
    folder = resolve(model)
    if heads is not None:
        return folder, resolve(heads)
    config = read_json(folder / "config.json")
    base = named_base(config)
    has_head_file = _head_file(folder) is not None
    if base and (has_head_file or _is_of_drafter(config)):  # no full model that was fine-tuned
        beside = folder / str(base)
        return resolve(str(beside) if beside.is_dir() else str(base)), folder
    if _is_of_drafter(config):
        raise ConfigError(f"{folder} holds a drafter that names no base model; give that, and --heads {folder}")
    if (folder / "heads" / "config.json").is_file():
        return folder, folder / "heads"
    return folder, folder if has_head_file or "medusa_num_heads" in config else None


def locate_heads(heads: str) -> tuple[Path, str | None]:
    """The folder of heads, and their base: a local folder's absolute path, a hub id, or None where nothing names it.

    Unlike `split_model`, this does not need the base to be there. It raises ConfigError where `heads` is neither a
    folder nor on the hub.
    """
    folder = resolve(heads)
    if _head_file(folder) is None and (folder / "heads" / "config.json").is_file():
        return folder / "heads", str(folder.resolve())
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    base = named_base(config)
    is_base = bool(config.get("architectures")) and not _is_of_drafter(config)
    if is_base and not (_head_file(folder) and base):
        return folder, str(folder.resolve())
    if not base:
        return folder, None
    beside = folder / str(base)
    return folder, str(beside.resolve()) if beside.is_dir() else str(base)


def read_heads(folder: Path, config: ModelConfig | None) -> HeadWeights:
    """Read heads for a base of this shape; None: of any shape that is consistent in itself.

    Raises:
        CheckpointError: naming the file and the key that is missing, left over, of the wrong shape, or not finite; or
            the folder holds Hydra heads, which are not read.
    """
    _refuse_hydra(folder)
    file = _head_file(folder)
    files = [file] if file is not None else tensor_files(folder)
    state = {key.removeprefix("medusa_heads."): tensor for path in files for key, tensor in read_tensors(path)}
    where = files[0] if len(files) == 1 else folder
    inside = {k.removeprefix("medusa_head."): t for k, t in state.items() if k.startswith("medusa_head.")}
    if inside:
        weights = _reference(inside, where, "reference v1.0")
    elif any(_VLLM_BLOCK.fullmatch(key) for key in state):
        weights = _vllm(state, where, read_json(folder / "config.json"))
    elif any(_BLOCK.fullmatch(key) for key in state):
        weights = _reference(state, where, "reference v0.1")
    else:
        raise CheckpointError(f"{where}: no Medusa heads; the first keys are {sorted(state)[:3]}")
    hidden_size = len(weights.blocks[0][0][0]) if config is None else config.hidden_size
    _check(weights, where, hidden_size, vocab_size(weights, folder) if config is None else config.vocab_size)
    return weights


def vocab_size(weights: HeadWeights, folder: Path) -> int | None:
    """Tokens of the base's vocabulary, as far as heads without their base tell."""
    if weights.token_map is None and weights.projections is not None:
        return len(weights.projections[0])
    path = folder / "config.json"
    named = read_json(path).get("vocab_size") if path.is_file() else None
    return named if isinstance(named, int) else None


def _refuse_hydra(folder: Path) -> None:
    """Hydra's heads have keys much like Medusa's, and compute something else."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    if (folder / HYDRA_FILE).is_file() or "hydra_num_heads" in config:
        kind = config.get("hydra_head_arch", "of an unknown kind")
        raise CheckpointError(
            f"{folder} holds Hydra heads ({kind}), which are not read: take Medusa heads or an EAGLE-3 drafter for the "
            "same base, or make one with manyheads train"
        )


def _is_of_drafter(config: dict[str, object]) -> bool:
    """Whether a config.json is that of heads in vLLM's format or an EAGLE-3 drafter, whatever architecture it names."""
    return config.get("model_type") == "medusa" or "draft_vocab_size" in config


def _head_file(folder: Path) -> Path | None:
    return next((folder / name for name in HEAD_FILES if (folder / name).is_file()), None)


def _reference(state: dict[str, Tensor], where: Path, name: str) -> HeadWeights:
    """`{h}.{l}.linear.…` blocks; `{h}.{L}.weight` projections, or none of them ("V2")."""
    parts, projections = _numbered(state, where, _BLOCK, _PROJECTION)
    blocks = _grid(parts, where, bias_needed=True)
    wanted = {(h, len(row)) for h, row in enumerate(blocks)}
    if projections and projections.keys() != wanted:
        odd = min(wanted ^ projections.keys())
        raise CheckpointError(f"{where}: key {odd[0]}.{odd[1]}.weight is missing or belongs to no head")
    ordered = [projections[key] for key in sorted(wanted)] if projections else None
    return HeadWeights(blocks, ordered, None, name if projections else 'TGI "V2"', read_accuracy(where))


def _vllm(state: dict[str, Tensor], where: Path, config: dict[str, object]) -> HeadWeights:
    parts, numbered = _numbered(state, where, _VLLM_BLOCK, _VLLM_PROJECTION, "token_map", "lm_head.weight")
    projections = {h: projection for (h,), projection in numbered.items()}
    token_map = state["token_map"].to(torch.int64) if "token_map" in state else None
    blocks = _grid(parts, where, bias_needed=bool(config.get("medusa_fc_bias", False)))
    if config.get("original_lm_head") and len(projections) <= 1:  # one projection for all heads
        shared = state.get("lm_head.weight", projections.get(0))
        projections = {} if shared is None else dict.fromkeys(range(len(blocks)), shared)
    if token_map is not None and token_map.numel():  # projections of the whole vocabulary are cut to the map
        rows = int(token_map.max()) + 1
        projections = {h: p[token_map] if rows <= len(p) != len(token_map) else p for h, p in projections.items()}
    if config.get("shares_base_lm_head") and not projections and token_map is None:
        return HeadWeights(blocks, None, None, "manyheads", read_accuracy(where))
    if sorted(projections) != list(range(len(blocks))):
        raise CheckpointError(f"{where}: {len(blocks)} heads, but lm_heads {sorted(projections)}")
    return HeadWeights(blocks, [projections[h] for h in sorted(projections)], token_map, "vLLM", read_accuracy(where))


def _numbered(
    state: dict[str, Tensor], where: Path, block: re.Pattern[str], projection: re.Pattern[str], *others: str
) -> tuple[dict[tuple[int, int], dict[str, Tensor]], dict[tuple[int, ...], Tensor]]:
    """The parts of blocks, and projections, by the numbers in their keys; `others` are keys that may be there too."""
    parts: dict[tuple[int, int], dict[str, Tensor]] = {}
    projections: dict[tuple[int, ...], Tensor] = {}
    for key, tensor in state.items():
        if match := block.fullmatch(key):
            parts.setdefault((int(match[1]), int(match[2])), {})[match[3]] = tensor
        elif match := projection.fullmatch(key):
            projections[tuple(map(int, match.groups()))] = tensor
        elif key not in others:
            raise CheckpointError(f"{where}: key {key} belongs to no Medusa head")
    return parts, projections


def _grid(
    parts: dict[tuple[int, int], dict[str, Tensor]], where: Path, bias_needed: bool
) -> list[list[tuple[Tensor, Tensor]]]:
    """[head][block] without gaps: heads are counted from the keys, since configs are wrong about them."""
    num_heads = max(h for h, _ in parts) + 1
    num_blocks = max(b for _, b in parts) + 1

    def block(h: int, b: int) -> tuple[Tensor, Tensor]:
        name, part = f"{where}: block {b} of head {h}", parts.get((h, b), {})
        for kind in ("weight", "bias") if bias_needed else ("weight",):
            if kind not in part:
                raise CheckpointError(f"{name} has no {kind}")
        weight = part["weight"]
        bias = part.get("bias", weight.new_zeros(weight.shape[:1]))
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            shapes = f"a weight of shape {tuple(weight.shape)} and a bias of shape {tuple(bias.shape)}"
            raise CheckpointError(f"{name} has {shapes}")
        return weight, bias

    return [[block(h, b) for b in range(num_blocks)] for h in range(num_heads)]


def _check(weights: HeadWeights, where: Path, hidden_size: int, vocab_size: int | None) -> None:
    square, tokens = (hidden_size, hidden_size), weights.token_map
    needed = (vocab_size if tokens is None else tokens.numel(), hidden_size)
    for h, blocks in enumerate(weights.blocks):
        for b, (weight, bias) in enumerate(blocks):
            name, found = f"{where}: block {b} of head {h}", tuple(weight.shape)
            if found != square or not weight.is_floating_point():
                raise CheckpointError(
                    f"{name} has shape {found} in {weight.dtype}; needed is {square} in floating point"
                )
            _check_finite(name, weight, bias)
    for h, projection in enumerate(weights.projections or []):
        name, found = f"{where}: the projection of head {h}", tuple(projection.shape)
        if found != needed:
            raise CheckpointError(f"{name} has shape {found}; needed is {needed}")
        _check_finite(name, projection)
    if tokens is not None and not tokens.numel():
        raise CheckpointError(f"{where}: token_map is empty")
    if tokens is not None and (int(tokens.min()) < 0 or (vocab_size and int(tokens.max()) >= vocab_size)):
        raise CheckpointError(f"{where}: token_map names tokens outside the vocabulary of {vocab_size}")


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(torch.isfinite(tensor.sum(dtype=torch.float64)) for tensor in tensors):
        raise CheckpointError(f"{name} holds values that are not finite")


def read_accuracy(where: Path) -> list[list[float]] | None:
    """The shares in tree_statistics.json, [depth][rank], in a folder or beside a file; None where there are none."""
    path = (where if where.is_dir() else where.parent) / STATISTICS
    if not path.is_file():
        return None
    rows = read_json(path).get("accuracy")
    if (
        not isinstance(rows, list)
        or not all(isinstance(row, list) for row in rows)
        or not all(isinstance(p, (int, float)) and 0 <= p <= 1 for row in rows for p in row)
    ):
        raise CheckpointError(f"{path}: accuracy must be a list of lists [head][rank] of shares between 0 and 1")
    return [[float(p) for p in row] for row in rows]
