"""A GGUF file as the folder that it would be elsewhere: config.json and a tokenizer, made once, and a link to the file.

So nothing beyond this package knows of GGUF but what reads tensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from manyheads.cache import cache_folder
from manyheads.config import ConfigError
from manyheads.gguf.architectures import read_config
from manyheads.gguf.file import GgufFile, check_types, opened
from manyheads.gguf.tensors import is_all_in_4_bits

ENDING = ".gguf"
WEIGHTS = "model.gguf"
"""Name of the link."""
_VERSION = 1
"""Of what is made here; another number makes it anew."""


def folder_of(path: Path) -> Path:
    """The folder that stands for a file, in the user's cache; it is made where it is not there yet.

    Raises:
        ConfigError, CheckpointError: the file cannot be read, or holds what is not supported; or no folder can be made.
    """
    path = path.resolve()
    known = path.stat()
    mark = f"{_VERSION} {path} {known.st_size} {known.st_mtime_ns}"
    parent = cache_folder("gguf") / hashlib.sha256(mark.encode()).hexdigest()[:16]
    folder = parent / path.stem
    if folder.is_dir():
        return folder
    try:
        parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=parent))
    except OSError as error:
        raise ConfigError(f"no folder for {path.name} can be made in {parent}: {error}; set XDG_CACHE_HOME") from error
    try:
        _fill(made, path)
        _publish(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _publish(made: Path, folder: Path) -> None:
    """Give what was made its name, unless another process was faster."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _fill(folder: Path, path: Path) -> None:
    file = opened(path)
    config = read_config(file)
    check_types(file)
    config["dtype"] = _dtype(file)
    config["quantization_config"] = {"quant_method": "gguf"} | ({"bits": 4} if is_all_in_4_bits(file) else {})
    (folder / WEIGHTS).symlink_to(path)
    _save_tokenizer(folder, path)
    # last, over whatever was written with the tokenizer
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _dtype(file: GgufFile) -> str:
    """What a device that has a choice computes in: as most numbers of the file are, bfloat16 for those in few bits."""
    kinds = [tensor.tensor_type.name for tensor in file.tensors if len(tensor.shape) > 1]
    names = {"F16": "float16", "F32": "float32"}
    return names.get(max(set(kinds), key=kinds.count), "bfloat16")


def _save_tokenizer(folder: Path, path: Path) -> None:
    """Have transformers read the tokenizer and its chat template, and write them in the form that all have."""
    from transformers import AutoTokenizer

    try:
        hf: Any = AutoTokenizer.from_pretrained(
            str(folder), gguf_file=WEIGHTS, local_files_only=True, trust_remote_code=False
        )
        hf.save_pretrained(str(folder))
    except (OSError, ValueError, KeyError, IndexError, ImportError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"{path}: transformers cannot read the tokenizer: {reason}") from error
