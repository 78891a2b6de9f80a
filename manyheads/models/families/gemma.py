"""Gemma 2 and the text models of Gemma 3: norms on both sides that are kept by their difference from 1, a scaled
embedding, capped scores and logits (2), norms of queries and keys (3), and windows in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyheads.models import llama
from manyheads.models.config import FULL, GATED, SLIDING, ModelConfig, rope_keys, windows_of
from manyheads.models.families.llama import COMMON
from manyheads.models.family import Family
from manyheads.models.keys import Keys
from manyheads.models.llama import LayerParts, norm_of, whole
from manyheads.models.parameters import Parameters
from manyheads.models.rope import Rope


def read_gemma2(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a Gemma 2; raises what `ModelConfig.read` does."""
    return _read(keys, folder, attention_softcap=_cap(keys, "attn_logit_softcapping"), windows=_windows(keys, 2))


def read_gemma3(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a Gemma 3; raises what `ModelConfig.read` does."""
    windows = _windows(keys, keys.integer("sliding_window_pattern"))
    near, far = _ropes(keys)
    return _read(
        keys, folder, qk_norm=True, windows=windows, ropes=tuple(far if window is None else near for window in windows)
    )


def _read(keys: Keys, folder: Path, **own: Any) -> ModelConfig:
    bias = keys.flag("attention_bias")
    return ModelConfig.read(
        keys,
        folder,
        qkv_bias=bias,
        o_bias=bias,
        norm_offset=1.0,
        activation=keys.choice("hidden_activation", GATED),
        embedding_multiplier=keys.integer("hidden_size") ** 0.5,
        attention_scale=keys.number("query_pre_attn_scalar") ** -0.5,
        logits_softcap=_cap(keys, "final_logit_softcapping"),
        **own,
    )


def _cap(keys: Keys, key: str) -> float | None:
    return None if keys.value(key) is None else keys.number(key)


def _windows(keys: Keys, pattern: int) -> tuple[int | None, ...]:
    """All layers but the last of each `pattern` look back over a window."""
    types = [SLIDING if (i + 1) % pattern else FULL for i in range(keys.integer("num_hidden_layers"))]
    return windows_of(keys, types)


def _ropes(keys: Keys) -> tuple[Rope, Rope]:
    """Of layers with a window, and of the others, each with a base of its own; only these are ever stretched."""
    said = keys.value("rope_parameters") or {}
    if not isinstance(said, Mapping) or not set(said) <= {SLIDING, FULL}:
        raise keys.wrong("rope_parameters", f"an object with {SLIDING} and {FULL}")
    dim = keys.integer("head_dim")
    parameters = {kind: said.get(kind) or {} for kind in (SLIDING, FULL)}
    far = dict(parameters[FULL]) if isinstance(parameters[FULL], Mapping) else parameters[FULL]
    scaling = keys.value("rope_scaling")
    if isinstance(far, dict) and isinstance(scaling, Mapping):
        far |= scaling
    elif scaling is not None:
        raise keys.wrong("rope_scaling", "an object")
    if isinstance(far, dict) and far.get("truncate") is False:
        raise keys.wrong("rope_parameters", "without truncate, which transformers does not look at here")
    theta, local = keys.value("rope_theta"), keys.value("rope_local_base_freq")
    bases = {SLIDING: 10000.0 if local is None else local, FULL: 1000000.0 if theta is None else theta}
    near = parameters[SLIDING]
    if not isinstance(near, Mapping) or not isinstance(far, Mapping):
        raise keys.wrong("rope_parameters", f"an object with objects for {SLIDING} and {FULL}")
    return (
        rope_keys(keys, dim).read({"rope_theta": bases[SLIDING], **near}),
        rope_keys(keys, dim).read({"rope_theta": bases[FULL], **far}),
    )


def parameters(config: ModelConfig) -> Parameters:
    """What a checkpoint holds."""
    return llama.parameters(config, _layer)


def _layer(config: ModelConfig, at: str) -> LayerParts:
    parts = llama.layer_parameters(config, at)
    return parts | {
        "o": whole(parts["o"]),
        "attention_norm": norm_of(config, f"{at}post_attention_layernorm"),
        "post_norm": norm_of(config, f"{at}pre_feedforward_layernorm"),
        "down": whole(parts["down"]),
        "mlp_norm": norm_of(config, f"{at}post_feedforward_layernorm"),
    }


_KEYS = COMMON | {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": None,
}
del _KEYS["hidden_act"]

GEMMA2 = Family(
    architecture="Gemma2ForCausalLM", model_type="gemma2", keys=_KEYS, read=read_gemma2, parameters=parameters
)
GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    keys=_KEYS
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": None,
    },
    read=read_gemma3,
    parameters=parameters,
)
