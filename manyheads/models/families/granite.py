"""Granite 3: a Llama with multipliers of the embedding, the residual, attention and the logits."""

from __future__ import annotations

from pathlib import Path

from manyheads.models.config import ModelConfig
from manyheads.models.families.llama import COMMON
from manyheads.models.family import Family
from manyheads.models.keys import Keys


def read_granite(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a Granite; raises what `ModelConfig.read` does."""
    bias = keys.flag("attention_bias")
    return ModelConfig.read(
        keys,
        folder,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
        embedding_multiplier=keys.number("embedding_multiplier"),
        residual_multiplier=keys.number("residual_multiplier"),
        attention_scale=keys.number("attention_multiplier"),
        logits_multiplier=1 / keys.number("logits_scaling"),
    )


GRANITE = Family(
    architecture="GraniteForCausalLM",
    model_type="granite",
    keys=COMMON
    | {
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    read=read_granite,
)
