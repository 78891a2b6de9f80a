"""Medusa heads to disk, in every format that is in use (checkpoint.py reads them, and lists their keys).

| format | is | can hold |
|---|---|---|
| manyheads | vLLM's layout, where heads may also use the base's projection | everything |
| vllm | `model.safetensors`, a folder for vLLM's speculative config | own or one shared projection, which may be cut |
| tgi | `medusa_lm_head.safetensors` | own projections ("V1"), or the base's for one block a head ("V2") |
| reference | `medusa_lm_head.pt` (medusa-llm v0.1) | own projections; all blocks of a head are one module |
| reference-full | base and heads in one folder (medusa-llm v1.0) | as reference |

What a format cannot hold is refused, or with `expand` written out in full: a projection is copied to every head that
uses it, and one of fewer tokens gets a row of zeros for every other token.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from manyheads.checkpoint import is_gguf, read_json, read_tensors, tensor_files
from manyheads.config import CheckpointError, ConfigError
from manyheads.models.loader import IGNORED_PREFIXES
from manyheads.speculation.medusa.checkpoint import HEAD_FILES, STATISTICS, HeadWeights

FORMATS = ("manyheads", "reference", "reference-full", "tgi", "vllm")
State = dict[str, Tensor]
_VLLM_LAYOUT = ("manyheads", "vllm")
_MANY_COPIES = "--expand writes it out for every head"


def write_heads(
    weights: HeadWeights,
    out: Path,
    form: str = "manyheads",
    *,
    base: str | None,
    vocab_size: int | None,
    statistics: Path | None = None,
    base_projection: Callable[[], Tensor] | None = None,
    expand: bool = False,
) -> None:
    """Write a folder of heads; every file appears whole or not at all.

    Args:
        weights: as read or trained.
        form: one of FORMATS, without `reference-full` (see `write_full`).
        base: the base model: a hub id, `builtin`, or a local folder's absolute path.
        vocab_size: of the base.
        statistics: a tree_statistics.json to go with the heads.
        base_projection: reads the base's projection [V, hidden], for heads that use it where the format cannot say so.
        expand: write out what the format cannot share or cut.

    Raises:
        ConfigError: the format cannot hold these heads; the message says what is missing.
    """
    if base is None and form in ("reference", "tgi"):
        raise ConfigError(f"the {form} format names the base model, and these heads name none; give --base")
    weights = fitting(weights, form, vocab_size, base_projection, expand)
    if form in _VLLM_LAYOUT:
        state, config = _vllm(weights, vocab_size)
        name = "model.safetensors"
    else:
        state, config = _reference(weights)
        name = HEAD_FILES[0] if form == "tgi" else HEAD_FILES[1]
        if weights.projections is None:
            config["version"] = "2"
    if base is not None:
        if (local := Path(base)).is_absolute() and local.is_dir():  # relative where readers understand that
            base = os.path.relpath(local.resolve(), out.resolve()) if form in _VLLM_LAYOUT else str(local.resolve())
        config["base_model_name_or_path"] = base
    out.mkdir(parents=True, exist_ok=True)
    if name.endswith(".pt"):
        replace(out / name, lambda path: torch.save(state, path))
    else:
        save_tensors(out / name, state)
    write_json(out / "config.json", config)
    if statistics is not None and statistics.is_file() and statistics.resolve() != (out / STATISTICS).resolve():
        replace(out / STATISTICS, lambda path: shutil.copyfile(statistics, path))


def write_full(
    weights: HeadWeights, base: Path, out: Path, *, statistics: Path | None = None, expand: bool = False
) -> None:
    """Write base and heads in one folder, as medusa-llm v1.0 does: the base's shards as they are, and one more.

    It raises ConfigError or CheckpointError where the format cannot hold these heads, or the base cannot be read.
    """
    vocab_size = int(read_json(base / "config.json").get("vocab_size", 0))
    weights = fitting(weights, "reference-full", vocab_size, lambda: read_projection(base), expand)
    heads, config = _reference(weights)
    out.mkdir(parents=True, exist_ok=True)
    for file in files_beside_weights(base):
        shutil.copyfile(file, out / file.name)
    files = tensor_files(base)
    weight_map: dict[str, str] = {}
    total = 0
    for number, source in enumerate([*files, None], 1):
        if source is None:
            state = {f"medusa_head.{key}": tensor for key, tensor in heads.items()}
        else:
            tensors = read_tensors(source, widen=True)
            state = {key: tensor for key, tensor in tensors if not key.startswith(IGNORED_PREFIXES)}
        if not state:  # the shard of heads that were there before
            continue
        name = f"model-{number:05}-of-{len(files) + 1:05}.safetensors"
        save_tensors(out / name, state)
        weight_map |= dict.fromkeys(state, name)
        total += sum(tensor.nbytes for tensor in state.values())
    write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    own = read_json(base / "config.json")
    if is_gguf(base):
        own.pop("quantization_config", None)  # all of it was widened
    write_json(out / "config.json", own | config)
    if statistics is not None and statistics.is_file():
        shutil.copyfile(statistics, out / STATISTICS)


def fitting(
    weights: HeadWeights, form: str, vocab_size: int | None, base_projection: Callable[[], Tensor] | None, expand: bool
) -> HeadWeights:
    """The heads as the format can hold them. Raises ConfigError where it cannot, or only with `expand`."""
    if form not in FORMATS:
        raise ConfigError(f"unknown format {form!r}; there are: {', '.join(FORMATS)}")
    blocks, projections, token_map = weights.blocks, weights.projections, weights.token_map
    alike = (torch.equal(w, head[0][0]) and torch.equal(b, head[0][1]) for head in blocks for w, b in head)
    if form.startswith("reference") and not all(alike):
        raise ConfigError(
            f"the {form} format holds heads whose blocks are one module (medusa-llm builds [ResBlock] * L and would "
            "load the last block into all places); these blocks differ, so there is no way to write them"
        )
    owns_needed = form.startswith("reference") or (form == "tgi" and len(blocks[0]) != 1)
    if projections is None and (owns_needed or form == "vllm"):
        what = f"the {form} format cannot use the base's vocabulary projection" + (
            " for heads of several blocks" if form == "tgi" else ""
        )
        if not expand:
            raise ConfigError(f"{what}; {_MANY_COPIES}")
        if base_projection is None:
            raise ConfigError(f"{what}, and the base is needed to write it out; give --base")
        projections = [base_projection()] * len(blocks)
    shared = weights.shares_one_projection
    if form == "vllm" and token_map is not None and torch.equal(token_map, torch.arange(vocab_size or 0)):
        token_map = None  # all tokens in order, as without a map
    if token_map is not None and projections is not None:
        reason = None
        if form not in _VLLM_LAYOUT:
            reason = (
                f"the {form} format has no token_map: its projections span the whole vocabulary; --expand writes a row "
                f"of zeros for every token that these heads leave out ({len(token_map)} are in the map)"
            )
        elif form == "vllm" and len(token_map) == vocab_size:
            reason = (
                "vLLM passes over a token_map that is as long as the vocabulary; --expand writes the rows in the "
                "tokens' order instead"
            )
        elif form == "vllm" and not shared:  # vLLM gives them the whole vocabulary's size, whatever the map says
            reason = (
                "vLLM reads a token_map only with one projection for all heads, and these have their own; --expand "
                f"writes a row of zeros for every token that they leave out ({len(token_map)} are in the map)"
            )
        if reason is not None:
            if not expand:
                raise ConfigError(reason)
            projections, token_map = _whole(projections, token_map, vocab_size), None
    if shared and form not in _VLLM_LAYOUT and not expand:
        raise ConfigError(
            f"these heads share one projection, and every head of the {form} format has its own; {_MANY_COPIES}"
        )
    return HeadWeights(blocks, projections, token_map, weights.format, weights.accuracy)


def files_beside_weights(folder: Path) -> list[Path]:
    """The files of a model's folder that configure it and its tokenizer."""
    kinds = (".json", ".jinja", ".txt", ".model")
    return [file for file in sorted(folder.iterdir()) if file.suffix in kinds and ".index." not in file.name]


def read_projection(base: Path) -> Tensor:
    """The projection [V, hidden] of a base, its own or the embedding's. Raises CheckpointError where there is none."""
    tied = bool(read_json(base / "config.json").get("tie_word_embeddings", False))
    wanted = "embed_tokens.weight" if tied else "lm_head.weight"
    for file in tensor_files(base):
        for key, tensor in read_tensors(file, widen=True):
            if key.removeprefix("model.") == wanted:
                return tensor
    raise CheckpointError(f"{base} holds no {wanted}, which is its vocabulary projection")


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, then put it there: no reader sees a part of it."""
    beside = path.with_name(f".{path.name}.new")
    beside.touch()
    mode = stat.S_IMODE(beside.stat().st_mode)
    write(beside)
    beside.chmod(mode)  # safetensors makes files that their owner alone can read
    os.replace(beside, path)


def write_json(path: Path, value: dict[str, Any], indent: int = 2) -> None:
    """Write an object to a JSON file, whole or not at all."""
    text = json.dumps(value, indent=indent) + "\n"
    replace(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def _vllm(weights: HeadWeights, vocab_size: int | None) -> tuple[State, dict[str, Any]]:
    hidden = weights.blocks[0][0][0].shape[0]
    if vocab_size is None:
        raise ConfigError("the size of the base's vocabulary is needed, and nothing here tells it; give --base")
    has_bias = any(bool(bias.any()) for head in weights.blocks for _, bias in head)
    config: dict[str, Any] = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": hidden,
        "vocab_size": vocab_size,
        "truncated_vocab_size": vocab_size if weights.token_map is None else len(weights.token_map),
        "num_heads": len(weights.blocks),
        "num_hidden_layers": len(weights.blocks[0]),
        "medusa_fc_bias": has_bias,
    }
    state: State = {}
    for h, head in enumerate(weights.blocks):
        for layer, (weight, bias) in enumerate(head):
            state[f"blocks.{h}.layers.{layer}.weight"] = weight
            if has_bias:
                state[f"blocks.{h}.layers.{layer}.bias"] = bias
    if weights.projections is None:
        config["shares_base_lm_head"] = True
    elif weights.shares_one_projection:
        config["original_lm_head"] = True
        state["lm_head.weight"] = weights.projections[0]
    else:
        state |= {f"lm_heads.{h}.weight": projection for h, projection in enumerate(weights.projections)}
    if weights.token_map is not None:
        state["token_map"] = weights.token_map
    return state, config


def _reference(weights: HeadWeights) -> tuple[State, dict[str, Any]]:
    state: State = {}
    for h, head in enumerate(weights.blocks):
        for layer, (weight, bias) in enumerate(head):
            state |= {f"{h}.{layer}.linear.weight": weight, f"{h}.{layer}.linear.bias": bias}
        if weights.projections is not None:
            state[f"{h}.{len(head)}.weight"] = weights.projections[h]
    return state, {"medusa_num_heads": len(weights.blocks), "medusa_num_layers": len(weights.blocks[0])}


def _whole(projections: list[Tensor], token_map: Tensor, vocab_size: int | None) -> list[Tensor]:
    """Projections of the whole vocabulary; one that is shared stays shared."""
    if vocab_size is None:
        raise ConfigError("the size of the base's vocabulary is needed, and nothing here tells it; give --base")

    distinct = {id(own): own for own in projections}
    whole = {
        key: own.new_zeros(vocab_size, own.shape[1]).index_copy_(0, token_map, own) for key, own in distinct.items()
    }
    return [whole[id(own)] for own in projections]


def save_tensors(path: Path, state: State) -> None:
    """Write a safetensors file, which wants contiguous tensors that share no memory."""
    seen: set[int] = set()
    result: State = {}
    for key, tensor in state.items():
        storage = tensor.untyped_storage().data_ptr()
        alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes and storage not in seen
        result[key] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage)
    replace(path, lambda beside: save_file(result, beside, metadata={"format": "pt"}))
