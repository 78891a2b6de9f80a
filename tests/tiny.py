"""A tiny random checkpoint with Medusa heads. With 16 tokens, ten candidates a head are often right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.models.config import ModelConfig
from manyheads.models.rope import Rope

VOCAB = 16
HIDDEN = 32
HEADS = 3


def model_config(**changes: Any) -> ModelConfig:
    """A Llama of two layers, for tests that make its parts themselves.

    Args:
        changes: of its fields.
    """
    some: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "ropes": (Rope(10.0, 16),) * 2,
        "windows": (None,) * 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return ModelConfig(**(some | changes))


def make_model(**changes: Any) -> LlamaForCausalLM:
    """A base as transformers has it, with random weights, the same ones every time.

    Args:
        changes: of its LlamaConfig.
    """
    torch.manual_seed(0)
    some: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(some | changes))).eval()


def save_model(
    folder: Path, hidden: int = HIDDEN, intermediate: int = 48, head_dim: int = 8, vocab_size: int = VOCAB
) -> LlamaForCausalLM:
    """Write base and heads ("V2") to `folder`; the base as transformers has it."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "head_dim": head_dim, "vocab_size": vocab_size}
    model = make_model(**sizes)
    model.save_pretrained(folder)
    save_heads(folder, hidden)
    return model


def save_heads(folder: Path, hidden: int) -> None:
    """Write random heads ("V2") beside the base that stands in `folder`."""
    heads = folder / "heads"
    heads.mkdir()
    state = {f"{h}.0.linear.weight": torch.randn(hidden, hidden) / 8 for h in range(HEADS)}
    state |= {f"{h}.0.linear.bias": torch.zeros(hidden) for h in range(HEADS)}
    save_file(state, heads / "medusa_lm_head.safetensors")
    (heads / "config.json").write_text(json.dumps({"medusa_num_heads": HEADS, "base_model_name_or_path": ".."}))
