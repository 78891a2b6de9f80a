"""SmolLM3: a Llama in which some layers know no positions."""

from __future__ import annotations

from pathlib import Path

from manyheads.models.config import FULL, SLIDING, ModelConfig, head_dim_of, rope_keys, windows_of
from manyheads.models.families.llama import COMMON
from manyheads.models.family import Family
from manyheads.models.keys import Keys
from manyheads.models.rope import NO_ROPE


def read_smollm3(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a SmolLM3; raises what `ModelConfig.read` does."""
    bias = keys.flag("attention_bias")
    turned = _turned(keys)
    rope = rope_keys(keys, head_dim_of(keys), default_theta=2000000.0).read()
    slides = keys.flag("use_sliding_window") and keys.value("sliding_window") is not None
    types = [SLIDING if slides and not turns else FULL for turns in turned]
    windows = windows_of(keys, types)
    if not slides and any(windows):
        raise keys.wrong("use_sliding_window", f"true, since layers are of {SLIDING}")
    return ModelConfig.read(
        keys,
        folder,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
        ropes=tuple(rope if turns else NO_ROPE for turns in turned),
        windows=windows,
    )


def _turned(keys: Keys) -> list[bool]:
    """Whether each layer turns queries and keys."""
    num_layers, said = keys.integer("num_hidden_layers"), keys.value("no_rope_layers")
    interval = keys.integer("no_rope_layer_interval")
    if said is None:
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if not isinstance(said, list) or len(said) < num_layers or not set(said) <= {0, 1}:
        raise keys.wrong("no_rope_layers", f"{num_layers} times 0 or 1")
    return [bool(turns) for turns in said[:num_layers]]


SMOLLM3 = Family(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    keys=COMMON
    | {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "layer_types": None,
        "attention_bias": False,
        "mlp_bias": False,
    },
    read=read_smollm3,
)
