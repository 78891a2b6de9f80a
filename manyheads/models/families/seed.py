"""Seed-OSS: a Llama with biases of queries, keys and values, and one of attention's output by a switch of its own."""

from __future__ import annotations

from pathlib import Path

from manyheads.models.config import ModelConfig
from manyheads.models.families.llama import COMMON
from manyheads.models.family import Family
from manyheads.models.keys import Keys


def read_seed_oss(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a Seed-OSS; raises what `ModelConfig.read` does."""
    return ModelConfig.read(
        keys,
        folder,
        qkv_bias=keys.flag("attention_bias"),
        o_bias=keys.flag("attention_out_bias"),
        mlp_bias=keys.flag("mlp_bias"),
    )


SEED_OSS = Family(
    architecture="SeedOssForCausalLM",
    model_type="seed_oss",
    keys=COMMON
    | {
        "vocab_size": 155136,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "max_position_embeddings": 524288,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "head_dim": 128,
    },
    read=read_seed_oss,
)
