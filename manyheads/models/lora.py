"""Adapters in peft's format: `adapter_config.json` beside `adapter_model.safetensors` (or `.bin`).

Every key of the configuration that changes the arithmetic is read, or refused by its name; every tensor belongs to a
projection of the base's layers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.checkpoint import read_json, read_tensors, resolve, tensor_files
from manyheads.config import CheckpointError, ConfigError
from manyheads.models.config import ModelConfig
from manyheads.models.parameters import Packed
from manyheads.models.registry import parameters

CONFIG = "adapter_config.json"
IRRELEVANT = frozenset({
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "lora_dropout", "loftq_config", "eva_config", "corda_config", "layers_to_transform", "layers_pattern",
    "exclude_modules", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
})  # fmt: skip
"""Keys that say where an adapter comes from, how it was trained, or which modules it has, which the tensors say too."""
READ = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias",
    "init_lora_weights",
})  # fmt: skip
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""What `init_lora_weights` may be: other ways to begin change the base's weights as well."""
PREFIX = "base_model.model."
"""What peft's names begin with."""
_Kind = type[int] | tuple[type[int], type[float]]
_WEIGHT = re.compile(r"(.+)\.lora_([AB])\.weight")


@dataclass(eq=False)
class Adapter:
    """An adapter as it was read."""

    name: str
    """By which requests choose it."""
    weights: dict[str, tuple[Tensor, Tensor, float]]
    """By the base's module, without the leading `model.`: A [r, in] and B [out, r], as they are in the file, and what
    their product is multiplied by."""


def read_adapters(named: dict[str, str], config: ModelConfig) -> list[Adapter]:
    """Read adapters by their names, in order.

    Args:
        named: hub ids or local folders, by name.
        config: of the base.

    Raises:
        ConfigError, CheckpointError: one of them is not supported, or does not fit.
    """
    return [read_adapter(name, _folder(name, where), config) for name, where in named.items()]


def read_adapter(name: str, folder: Path, config: ModelConfig) -> Adapter:
    """Read an adapter for a base; raises as `read_adapters`."""
    settings = _Settings(folder)
    shapes = _shapes(config)
    found: dict[str, dict[str, Tensor]] = {}
    for path in tensor_files(folder, "adapter_model", "adapter_model"):
        for key, tensor in read_tensors(path):
            module, side = _module(path, key, shapes, config)
            rank, (outputs, inputs) = settings.rank(module), shapes[module]
            wanted = (rank, inputs) if side == "A" else (outputs, rank)
            if tuple(tensor.shape) != wanted:
                why = f"r={rank}, and the base's {module} is {outputs} × {inputs}"
                raise CheckpointError(f"{path}: {key} has shape {tuple(tensor.shape)}, not {wanted} ({why})")
            if not torch.isfinite(tensor.sum(dtype=torch.float64)):
                raise CheckpointError(f"{path}: {key} holds values that are not finite")
            found.setdefault(module, {})[side] = tensor
    for module, sides in found.items():
        if len(sides) == 1:
            missing = "B" if "A" in sides else "A"
            raise CheckpointError(f"{folder}: {module} has no lora_{missing}")
    settings.check_targets(found)
    weights = {module: (sides["A"], sides["B"], settings.scale(module)) for module, sides in found.items()}
    return Adapter(name, weights)


def _folder(name: str, where: str) -> Path:
    try:
        folder = resolve(where)
    except ConfigError as error:
        raise ConfigError(f"lora {name}: {error}") from error
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"lora {name}: {folder} holds no {CONFIG}, as peft writes it")
    return folder


def _shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every projection that adapters may add to, by module."""
    packed = [part for layer in parameters(config).layers for part in layer.values() if isinstance(part, Packed)]
    shapes = {key.removesuffix(".weight"): shape for part in packed for key, shape in part.shapes.items()}
    return {module: shape for module, shape in shapes.items() if len(shape) == 2}


def _module(path: Path, key: str, shapes: dict[str, tuple[int, int]], config: ModelConfig) -> tuple[str, str]:
    """The base's module that a tensor belongs to, and its side. Raises CheckpointError: there is none."""
    match = _WEIGHT.fullmatch(key)
    if match is None or not key.startswith(PREFIX):
        raise CheckpointError(f"{path}: {key} is no lora_A or lora_B weight of a projection; nothing else is supported")
    module = match[1].removeprefix(PREFIX).removeprefix("model.")
    if module not in shapes:
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in shapes}))
        raise CheckpointError(
            f"{path}: {key}: adapters may add to {kinds} of the layers of a {config.architecture}, not to {module}"
        )
    return module, match[2]


class _Settings:
    """What an adapter_config.json says. Raises ConfigError, naming the key that is not supported."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CONFIG
        self.raw = raw = read_json(self.path)
        if raw.get("peft_type") != "LORA":
            raise self._wrong("peft_type", "'LORA'")
        if raw.get("init_lora_weights") not in PLAIN_STARTS:
            raise self._wrong(
                "init_lora_weights", "one that leaves the base's weights as they are; let peft convert it"
            )
        if raw.get("bias", "none") != "none":
            raise self._wrong("bias", "'none'")
        for key, value in raw.items():
            if key not in READ | IRRELEVANT and value not in (None, False, {}, []):
                raise ConfigError(f"{self.path}: {key}={value!r} is not supported")
        self._ranks, self._rank = self._patterns("rank_pattern", int), self._positive("r", raw.get("r"), int)
        self._alphas = self._patterns("alpha_pattern", (int, float))
        self._alpha = self._positive("lora_alpha", raw.get("lora_alpha"), (int, float))
        if not isinstance(raw.get("use_rslora", False), bool):
            raise self._wrong("use_rslora", "true or false")

    def rank(self, module: str) -> int:
        """The rank of a module's weights."""
        return int(self._value(self._ranks, module, self._rank))

    def scale(self, module: str) -> float:
        """What a module's sum is multiplied by (rsLoRA: Kalajdzievski 2023)."""
        rank, alpha = self.rank(module), self._value(self._alphas, module, self._alpha)
        return alpha / (math.sqrt(rank) if self.raw.get("use_rslora") else rank)

    def check_targets(self, found: dict[str, Any]) -> None:
        """See that there are weights for every name in `target_modules`. Raises CheckpointError."""
        if not found:
            raise CheckpointError(f"{self.path.parent} holds no lora_A and lora_B weights")
        targets = self.raw.get("target_modules")
        for target in targets if isinstance(targets, list) else ():
            full = str(target).removeprefix("model.")
            if not any(module == full or module.endswith(f".{full}") for module in found):
                raise CheckpointError(f"{self.path}: target_modules names {target!r}, which there are no weights for")

    def _patterns(self, key: str, kind: _Kind) -> dict[str, float]:
        patterns = self.raw.get(key) or {}
        if not isinstance(patterns, dict):
            raise self._wrong(key, "numbers by module")
        for pattern, value in patterns.items():
            self._positive(f"{key}[{pattern!r}]", value, kind)
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{self.path}: {key}: {pattern!r} is no regular expression: {error}") from error
        return patterns

    def _positive(self, key: str, value: Any, kind: _Kind) -> float:
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
            what = "whole number" if kind is int else "number"
            raise ConfigError(f"{self.path}: {key} must be a {what} above 0, not {value!r}")
        return value

    @staticmethod
    def _value(patterns: dict[str, float], module: str, default: float) -> float:
        """As peft finds it: the first pattern that the end of a module's name matches."""
        names = (f"model.{module}", module)
        found = (v for p, v in patterns.items() if any(re.match(rf"(.*\.)?({p})$", name) for name in names))
        return next(found, default)

    def _wrong(self, key: str, wanted: str) -> ConfigError:
        return ConfigError(f"{self.path}: {key}={self.raw.get(key)!r} is not supported; it must be {wanted}")
