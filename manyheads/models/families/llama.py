"""Llama, and Mistral, which looks back over a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manyheads.models.config import SLIDING, ModelConfig, windows_of
from manyheads.models.family import Family
from manyheads.models.keys import Keys

COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": None,
}
"""What families with Llama's layers declare alike."""


def read_llama(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a Llama; raises what `ModelConfig.read` does."""
    bias = keys.flag("attention_bias")
    return ModelConfig.read(keys, folder, qkv_bias=bias, o_bias=bias, mlp_bias=keys.flag("mlp_bias"))


def read_mistral(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a Mistral; raises what `ModelConfig.read` does."""
    return ModelConfig.read(keys, folder, windows=windows_everywhere(keys))


def windows_everywhere(keys: Keys) -> tuple[int | None, ...] | None:
    """The windows of a family whose layers all look back as far as `sliding_window` says; null: to the beginning."""
    if keys.value("sliding_window") is None:
        return None
    return windows_of(keys, [SLIDING] * keys.integer("num_hidden_layers"))


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    keys=COMMON | {"attention_bias": False, "mlp_bias": False, "head_dim": None},
    read=read_llama,
)
MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    keys=COMMON
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    read=read_mistral,
)
