"""Finding and reading the files of a checkpoint, whatever is in it: a model, Medusa heads, a drafter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manyheads.config import BUILTIN, CheckpointError, ConfigError
from manyheads.gguf.folder import ENDING, folder_of
from manyheads.gguf.folder import WEIGHTS as GGUF_WEIGHTS
from manyheads.gguf.tensors import described as described_gguf
from manyheads.gguf.tensors import read as read_gguf

BUILTIN_FOLDER = Path(__file__).resolve().parent / "builtin" / "model"

HUB_PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.pt", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt"]


def resolve(model: str) -> Path:
    """The folder of a model: `builtin`, a local folder or GGUF file, or a hub id, which may end in the name of a GGUF
    file. What is on the hub is downloaded (or found in the cache).

    Raises:
        ConfigError, CheckpointError: saying what to do, or what is wrong with a GGUF file.
    """
    if model == BUILTIN:
        return BUILTIN_FOLDER
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    is_file = path.suffix == ENDING
    if is_file and path.is_file():
        return folder_of(path)
    is_local = path.exists() or model.startswith((".", "/", "~"))
    if is_local or (model.count("/") < 2 if is_file else model.count("/") != 1):
        raise ConfigError(
            f"{model!r} is no folder; give a local folder, a hub id (name/model) or {BUILTIN!r}; or a GGUF file "
            f"(FILE{ENDING}, or name/model/FILE{ENDING} on the hub)"
        )
    return folder_of(_from_hub(model)) if is_file else _from_hub(model)


def _from_hub(model: str) -> Path:
    """A model's folder on this machine, or the file that follows the model's name. Raises ConfigError."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    ignored = ["original/*", "consolidated*"]
    try:
        if model.count("/") > 1:
            owner, name, file = model.split("/", 2)
            return Path(hf_hub_download(f"{owner}/{name}", file))
        return Path(snapshot_download(model, allow_patterns=HUB_PATTERNS, ignore_patterns=ignored))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{model!r} is no local folder and could not be had from the hub ({reason}). Check the name and the "
            f"network; for a gated model log in with `hf auth login`; or use the built-in model: {BUILTIN!r}"
        ) from error


def tensor_files(folder: Path, stem: str = "model", pickle_stem: str = "pytorch_model") -> list[Path]:
    """The files of a checkpoint: single or sharded, safetensors before pickles; or a GGUF file, which has a folder.

    Raises:
        CheckpointError: there are none, or a shard is missing.
    """
    for name in (f"{stem}.safetensors", f"{pickle_stem}.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} has no weight_map")
            shards = sorted({str(shard) for shard in weight_map.values()})
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise CheckpointError(f"{index} names {missing[0]}, which is not there")
            return [folder / shard for shard in shards]
        if (folder / name).is_file():
            return [folder / name]
    if is_gguf(folder):
        return [folder / GGUF_WEIGHTS]
    raise CheckpointError(f"{folder} holds no weights ({stem}.safetensors or {pickle_stem}.bin, single or sharded)")


def read_tensors(path: Path, widen: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every (key, tensor) of a safetensors, GGUF or pickle file; code in a pickle is refused, not run.

    Args:
        widen: tensors of a GGUF file come in floating point, all of them.

    Raises:
        CheckpointError: the file is damaged or holds something else than tensors.
    """
    if path.suffix == ".safetensors":
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                yield key, file.get_tensor(key)
    elif path.suffix == ENDING:
        yield from read_gguf(path, widen)
    else:
        yield from _pickled(path).items()


def is_gguf(folder: Path) -> bool:
    """Whether a folder stands for a GGUF file."""
    return (folder / GGUF_WEIGHTS).is_file()


def described(folder: Path, dtype: torch.dtype, is_rounded: bool, in_blocks: bool) -> str | None:
    """A line on what becomes of a checkpoint's weights, if that is not plain.

    Args:
        dtype: of activations.
        is_rounded: whether a setting has weights rounded to few bits as they come.
        in_blocks: whether the device multiplies weights in blocks as they are.
    """
    return described_gguf(folder / GGUF_WEIGHTS, dtype, is_rounded, in_blocks) if is_gguf(folder) else None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _pickled(path: Path, mmap: bool = False) -> dict[str, Tensor]:
    """The tensors of a pickle; with `mmap` they are views of the file, which must not change while they are used."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read as plain tensors ({reason}); nothing in it was run") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items()):
        raise CheckpointError(f"{path} holds no plain dictionary of tensors")
    return state


def tensor_keys(folder: Path) -> set[str]:
    """The keys of the tensors that `tensor_files` would find, without reading them; empty where there are none.

    Raises:
        CheckpointError: a file is damaged, or holds something else than tensors.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return set(read_json(index).get("weight_map") or ())
        path = folder / name
        if path.is_file() and path.suffix == ".safetensors":
            with _opened(path) as file:
                return set(file.keys())
        if path.is_file():
            return set(_pickled(path, mmap=is_zipfile(path)))  # as torch writes it since 1.6
    return set()


def named_base(config: dict[str, Any]) -> str | None:
    """The base model that a config.json of heads or of a drafter names (speculators: its "verifier"), or None."""
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    return config.get("base_model_name_or_path") or verifier.get("name_or_path") or None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ConfigError saying what is wrong with it."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return value
