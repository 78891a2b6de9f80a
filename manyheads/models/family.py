"""What a family of models is: the record of everything that depends on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyheads.models import llama
from manyheads.models.config import ModelConfig
from manyheads.models.keys import Keys
from manyheads.models.parameters import Parameters


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that one class computes from one kind of checkpoint. Nothing else knows a family by its name."""

    architecture: str
    """The name that config.json gives it."""
    model_type: str
    """The other name that config.json gives it, by which transformers finds its class."""
    keys: Mapping[str, Any]
    """What transformers' configuration of it declares, with the defaults: all but `keys.IRRELEVANT`."""
    read: Callable[[Keys, Path], ModelConfig]
    """It makes a config of (what config.json says, the checkpoint's folder)."""
    parameters: Callable[[ModelConfig], Parameters] = llama.parameters
    """It says what a checkpoint holds: names, shapes, and which projections are packed into one product."""
    layer: type[llama.AttentionLayer] = llama.Layer
    """The class that holds the weights of a layer."""
    model: type[llama.Llama] = llama.Llama
    """The class with the forward pass."""
    can_be_shared: bool = True
    """Whether ranks can share it (`--tensor-parallel-size`)."""
