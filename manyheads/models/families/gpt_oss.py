"""gpt-oss: experts with biases and a clamped gate, heads with sinks, windows in every other layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from manyheads.attention.base import Heads
from manyheads.models import llama
from manyheads.models.config import FULL, SLIDING, ModelConfig, head_dim_of, rope_keys, windows_of
from manyheads.models.families.llama import COMMON
from manyheads.models.families.moe import ExpertLayer, MixtureOfExperts, experts_per_token_of, num_experts_of
from manyheads.models.family import Family
from manyheads.models.keys import Keys
from manyheads.models.linear import Split
from manyheads.models.llama import LayerParts
from manyheads.models.parameters import Parameters, Plain, Stacked

ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What transformers' class takes where config.json says nothing of rotary embedding."""


@dataclass(frozen=True, eq=False, kw_only=True)
class GptOssLayer(ExpertLayer):
    """A layer's weights."""

    sinks: Tensor  # [num_heads]


class GptOss(MixtureOfExperts):
    """The forward pass."""

    def _heads(self) -> Heads:
        layers = (layer for layer in self.layers if isinstance(layer, GptOssLayer))
        return replace(super()._heads(), sinks={i: layer.sinks.float() for i, layer in enumerate(layers)})


def read_gpt_oss(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration; raises what `ModelConfig.read` does."""
    bias, num_layers = keys.flag("attention_bias"), keys.integer("num_hidden_layers")
    said = keys.value("rope_scaling") or keys.value("rope_parameters")
    rope = rope_keys(keys, head_dim_of(keys), default_theta=150000.0).read(ROPE if said is None else said)
    return ModelConfig.read(
        keys,
        folder,
        qkv_bias=bias,
        o_bias=bias,
        has_sinks=True,
        ropes=(rope,) * num_layers,
        windows=windows_of(keys, [FULL if i % 2 else SLIDING for i in range(num_layers)]),
        activation=keys.choice("hidden_act", {"silu": "clamped silu"}),
        swiglu_alpha=keys.number("swiglu_alpha"),
        swiglu_limit=keys.number("swiglu_limit"),
        num_experts=num_experts_of(keys),
        experts_per_token=experts_per_token_of(keys),
        experts_add_up=True,
    )


def parameters(config: ModelConfig) -> Parameters:
    """What a checkpoint holds."""
    return llama.parameters(config, _layer)


def _layer(config: ModelConfig, at: str) -> LayerParts:
    hidden, inner, count = config.hidden_size, config.intermediate_size, config.num_experts
    gate_first = torch.arange(2 * inner).view(inner, 2).T.flatten()  # in the checkpoint they alternate
    return llama.layer_parameters(config, at) | {
        "sinks": Plain(f"{at}self_attn", (config.num_heads,), leaf="sinks"),
        "router": Plain(f"{at}mlp.router", (count, hidden)),
        "router_bias": Plain(f"{at}mlp.router", (count,), leaf="bias"),
        "gate_up": Stacked(f"{at}mlp.experts.gate_up_proj", count, 2 * inner, hidden, order=gate_first),
        "down": Stacked(f"{at}mlp.experts.down_proj", count, hidden, inner, Split.INPUTS),
    }


GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    keys=COMMON
    | {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts": None,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    read=read_gpt_oss,
    parameters=parameters,
    layer=GptOssLayer,
    model=GptOss,
)
