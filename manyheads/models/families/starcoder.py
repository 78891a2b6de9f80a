"""StarCoder2: layer norms, biases everywhere, and a feed-forward part without a gate."""

from __future__ import annotations

from pathlib import Path

from manyheads.models import llama
from manyheads.models.config import ModelConfig
from manyheads.models.families.llama import COMMON, windows_everywhere
from manyheads.models.family import Family
from manyheads.models.keys import Keys
from manyheads.models.linear import Split
from manyheads.models.llama import LayerParts
from manyheads.models.parameters import Packed, Parameters


def read_starcoder2(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a StarCoder2; raises what `ModelConfig.read` does."""
    bias = keys.flag("use_bias")
    return ModelConfig.read(
        keys,
        folder,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        norm="layer",
        norm_bias=True,
        rms_norm_eps=keys.number("norm_epsilon"),
        activation=keys.choice("hidden_act", {"gelu_pytorch_tanh": "plain gelu"}),
        windows=windows_everywhere(keys),
    )


def parameters(config: ModelConfig) -> Parameters:
    """What a checkpoint holds."""
    return llama.parameters(config, _layer)


def _layer(config: ModelConfig, at: str) -> LayerParts:
    mlp, hidden, inner, bias = f"{at}mlp.", config.hidden_size, config.intermediate_size, config.mlp_bias
    return llama.layer_parameters(config, at) | {
        "gate_up": Packed(mlp, {"c_fc": inner}, hidden, bias),
        "down": Packed(mlp, {"c_proj": hidden}, inner, bias, Split.INPUTS),
    }


_KEYS = COMMON | {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "sliding_window": None,
    "use_bias": True,
    "tie_word_embeddings": True,
}
del _KEYS["rms_norm_eps"]

STARCODER2 = Family(
    architecture="Starcoder2ForCausalLM",
    model_type="starcoder2",
    keys=_KEYS,
    read=read_starcoder2,
    parameters=parameters,
)
