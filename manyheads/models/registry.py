"""The families of models that are served, a record each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from manyheads.checkpoint import read_json
from manyheads.config import ConfigError
from manyheads.models import llama
from manyheads.models.config import ModelConfig
from manyheads.models.parameters import Parameters


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that one class computes from one kind of checkpoint. Nothing else knows a family by its name."""

    architecture: str
    """The name that config.json gives it."""
    read: Callable[[dict[str, Any], Path], ModelConfig] = ModelConfig.read
    """It makes a config of (what config.json holds, the checkpoint's folder)."""
    parameters: Callable[[ModelConfig], Parameters] = llama.parameters
    """It says what a checkpoint holds: names, shapes, and which projections are packed into one product."""
    layer: type[llama.Layer] = llama.Layer
    """The class that holds the weights of a layer."""
    model: type[llama.Llama] = llama.Llama
    """The class with the forward pass."""


LLAMA = Family(architecture="LlamaForCausalLM")
MISTRAL = Family(architecture="MistralForCausalLM", read=partial(ModelConfig.read, qkv_bias=False))
QWEN2 = Family(architecture="Qwen2ForCausalLM", read=partial(ModelConfig.read, qkv_bias=True))
QWEN3 = Family(architecture="Qwen3ForCausalLM", read=partial(ModelConfig.read, qk_norm=True))

FAMILIES = {family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def read_config(folder: Path) -> ModelConfig:
    """Read a checkpoint's config.json and generation_config.json.

    Raises:
        ConfigError: naming the file and the key that is missing or not supported.
    """
    raw = read_json(folder / "config.json")
    architecture = (raw.get("architectures") or ["?"])[0]
    if architecture not in FAMILIES:
        raise ConfigError(
            f"{folder / 'config.json'}: architecture {architecture} is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[architecture].read(raw, folder)


def parameters(config: ModelConfig) -> Parameters:
    """What a checkpoint of a model holds."""
    return FAMILIES[config.architecture].parameters(config)
