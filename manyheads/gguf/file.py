"""A GGUF file, opened by the package `gguf`: what it says of itself, and its tensors as they are stored."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from manyheads.config import CheckpointError, ConfigError

MISSING = object()


class GgufFile:
    """An open file. What is asked of its metadata is noted, so that what nobody asked for can be refused.

    Raises:
        ConfigError: the package that reads such files is not installed, or the file is one of several parts.
        CheckpointError: the file is damaged, or is no GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            from gguf import GGUFReader
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "gguf":
                raise
            raise ConfigError(f"{path} is a GGUF file, which needs a package: pip install 'manyheads[gguf]'") from error
        try:
            reader = GGUFReader(path)
            self._metadata = {key: field.contents() for key, field in reader.fields.items()}
        # what the package raises for a file that ends too early, says something impossible, or is of another kind
        except (ValueError, IndexError, KeyError, OverflowError, TypeError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} is no GGUF file, or not a whole one: {reason}") from error
        self.tensors: list[Any] = reader.tensors
        """The package's `ReaderTensor`s, mapped and not read: `name`, `tensor_type`, and `data` as it is stored."""
        self._asked: set[str] = set()
        if self.value("split.count", 0) > 1:
            parts = self.value("split.count")
            raise ConfigError(f"{path} is one of {parts} parts; join them: llama-gguf-split --merge FIRST WHOLE")
        self.architecture = str(self.value("general.architecture"))

    def value(self, key: str, default: Any = MISSING) -> Any:
        """What the metadata says; raises CheckpointError where it says nothing, unless there is a default."""
        self._asked.add(key)
        value = self._metadata.get(key, default)
        if value is MISSING:
            raise CheckpointError(f"{self.path}: {key} is missing")
        return value

    def number(self, key: str, kind: type[int] | type[float], default: Any = MISSING) -> Any:
        """A positive number of the architecture's own keys. Raises CheckpointError where it is something else."""
        key = f"{self.architecture}.{key}"
        value = self.value(key, default)
        if value is not default and (not isinstance(value, kind) or isinstance(value, bool) or not value > 0):
            what = "integer" if kind is int else "number"
            raise CheckpointError(f"{self.path}: {key} must be a positive {what}, not {str(value)[:40]}")
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        """See that one of the architecture's own keys has one of these values, or is missing.

        Raises:
            ConfigError: naming the key.
        """
        key = f"{self.architecture}.{key}"
        value = self.value(key, allowed[0])
        if value not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise ConfigError(f"{self.path}: {key} {str(value)[:40]} is not supported, only {wanted}")

    def check_all_asked(self) -> None:
        """See that nothing of what the architecture says of itself was overlooked. Raises ConfigError naming it."""
        own = sorted(key for key in self._metadata if key.startswith(f"{self.architecture}."))
        for key in own:
            if key not in self._asked:
                raise ConfigError(f"{self.path}: {key} {str(self._metadata[key])[:40]} is not supported")

    def tensor(self, name: str) -> Any:
        """A tensor by its name, None where there is none."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def widened(path: Path, tensor: Any, data: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """What blocks of a tensor stand for, in the type in which they are that exactly: float32, or as they are stored.

    Args:
        data: rows of the tensor's, as they are stored.

    Raises:
        ConfigError: the package cannot read blocks of this type.
    """
    from gguf import dequantize

    if data.dtype == np.float16:
        return np.array(data)
    try:
        return np.array(dequantize(data, tensor.tensor_type))
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise ConfigError(f"{path}: {tensor.name} is in {kind}, which the package gguf does not widen") from error


def check_types(file: GgufFile) -> None:
    """See that tensors of every type can be widened. Raises ConfigError naming the first that cannot."""
    seen = set()
    for tensor in file.tensors:
        if tensor.tensor_type not in seen:
            seen.add(tensor.tensor_type)
            widened(file.path, tensor, tensor.data.reshape(-1, tensor.data.shape[-1])[:1])


@functools.lru_cache(maxsize=4)
def _opened(path: Path, _changed: int) -> GgufFile:
    return GgufFile(path)


def opened(path: Path) -> GgufFile:
    """A file, opened once for all who read it. Raises what `GgufFile` does."""
    return _opened(path.resolve(), path.stat().st_mtime_ns)
