"""Phi-3 and Phi-4: queries, keys and values are one projection in the checkpoint, and so are gate and up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manyheads.config import ConfigError
from manyheads.models import llama
from manyheads.models.config import ModelConfig, head_dim_of, rope_keys
from manyheads.models.families.llama import COMMON, windows_everywhere
from manyheads.models.family import Family
from manyheads.models.keys import Keys
from manyheads.models.llama import LayerParts
from manyheads.models.parameters import Packed, Parameters
from manyheads.models.rope import LongScaling, row_order

_KEYS: dict[str, Any] = COMMON | {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}


def read_phi3(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a Phi-3; raises what `ModelConfig.read` does."""
    aliases = {"su": "longrope", "yarn": "longrope"}
    rope = rope_keys(keys, head_dim_of(keys), in_part=True, aliases=aliases).read()
    if not isinstance(rope.scaling, LongScaling | None):
        raise ConfigError(f"{keys.path}: rope scaling {rope.scaling.kind!r} is not supported of a Phi-3, only longrope")
    ropes = (rope,) * keys.integer("num_hidden_layers")
    return ModelConfig.read(keys, folder, ropes=ropes, windows=windows_everywhere(keys))


def parameters(config: ModelConfig) -> Parameters:
    """What a checkpoint holds."""
    return llama.parameters(config, _layer)


def _layer(config: ModelConfig, at: str) -> LayerParts:
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    qkv = {"qkv_proj": (heads * dim, kv_heads * dim, kv_heads * dim)}
    order = row_order(config.head_order, {"qkv_proj": heads + kv_heads}, behind=kv_heads * dim)
    return llama.layer_parameters(config, at) | {
        "qkv": Packed(f"{at}self_attn.", qkv, hidden, order=order),
        "gate_up": Packed(f"{at}mlp.", {"gate_up_proj": (inner, inner)}, hidden),
    }


PHI3 = Family(architecture="Phi3ForCausalLM", model_type="phi3", keys=_KEYS, read=read_phi3, parameters=parameters)
