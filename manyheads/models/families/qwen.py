"""Qwen2 and Qwen3: biases of queries, keys and values, or norms of queries and keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manyheads.models.config import FULL, SLIDING, ModelConfig, windows_of
from manyheads.models.families.llama import COMMON
from manyheads.models.family import Family
from manyheads.models.keys import Keys

_COMMON: dict[str, Any] = COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def read_qwen2(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a Qwen2; raises what `ModelConfig.read` does."""
    return ModelConfig.read(keys, folder, qkv_bias=True, windows=_windows(keys))


def read_qwen3(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a Qwen3; raises what `ModelConfig.read` does."""
    bias = keys.flag("attention_bias")
    return ModelConfig.read(keys, folder, qkv_bias=bias, o_bias=bias, qk_norm=True, windows=_windows(keys))


def _windows(keys: Keys) -> tuple[int | None, ...]:
    """From layer `max_window_layers` on, if windows are used at all."""
    num_layers, first = keys.integer("num_hidden_layers"), keys.value("max_window_layers")
    if not isinstance(first, int):
        raise keys.wrong("max_window_layers", "an integer")
    if not keys.flag("use_sliding_window"):
        if SLIDING in (keys.value("layer_types") or ()):
            raise keys.wrong("use_sliding_window", f"true, since layers are of {SLIDING}")
        first = num_layers
        keys.value("sliding_window")  # it means nothing then
        return (None,) * num_layers
    if keys.value("sliding_window") is None:
        first = num_layers
    return windows_of(keys, [SLIDING if i >= first else FULL for i in range(num_layers)])


QWEN2 = Family(architecture="Qwen2ForCausalLM", model_type="qwen2", keys=_COMMON, read=read_qwen2)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    keys=_COMMON | {"head_dim": 128, "attention_bias": False},
    read=read_qwen3,
)
