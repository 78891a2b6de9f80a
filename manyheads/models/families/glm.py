"""GLM-4 (0414): neighbours of half a head are turned, norms stand on both sides, gate and up are one projection."""

from __future__ import annotations

from pathlib import Path

from manyheads.models import llama
from manyheads.models.config import ModelConfig, head_dim_of, rope_keys
from manyheads.models.families.llama import COMMON
from manyheads.models.family import Family
from manyheads.models.keys import Keys
from manyheads.models.llama import LayerParts, norm_of, whole
from manyheads.models.parameters import Packed, Parameters


def read_glm4(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a GLM-4; raises what `ModelConfig.read` does."""
    rope = rope_keys(keys, head_dim_of(keys), in_part=True).read()
    ropes = (rope,) * keys.integer("num_hidden_layers")
    return ModelConfig.read(keys, folder, qkv_bias=keys.flag("attention_bias"), ropes=ropes, interleaved=True)


def parameters(config: ModelConfig) -> Parameters:
    """What a checkpoint holds."""
    return llama.parameters(config, _layer)


def _layer(config: ModelConfig, at: str) -> LayerParts:
    parts, inner = llama.layer_parameters(config, at), config.intermediate_size
    return parts | {
        "o": whole(parts["o"]),
        "attention_norm": norm_of(config, f"{at}post_self_attn_layernorm"),
        "gate_up": Packed(f"{at}mlp.", {"gate_up_proj": (inner, inner)}, config.hidden_size),
        "down": whole(parts["down"]),
        "mlp_norm": norm_of(config, f"{at}post_mlp_layernorm"),
    }


GLM4 = Family(
    architecture="Glm4ForCausalLM",
    model_type="glm4",
    keys=COMMON
    | {
        "vocab_size": 151552,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 0.00000015625,
        "attention_bias": True,
    },
    read=read_glm4,
    parameters=parameters,
)
