"""Tiny models of every family, made by transformers, which is what ours are compared with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""With 8 dimensions of base 100 and 32 positions, frequencies are kept, blended and slowed."""
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [4.0] * 4,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 12, **SLIDING}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama without grouped queries": ("llama", {"num_key_value_heads": 4}),
    "llama with wide heads": ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "llama of another base": ("llama", {"rope_parameters": {"rope_theta": 500.0}}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "yarn rope": ("llama", {"rope_parameters": YARN}),
    "dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    "mistral with a window": ("mistral", {"sliding_window": 7}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3 with biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "phi3": ("phi3", {"sliding_window": 9}),
    "phi3 tied, turned in part": (
        "phi3",
        {"tie_word_embeddings": True, "hidden_size": 64, "rope_parameters": {"partial_rotary_factor": 0.75}},
    ),
    "phi3 stretched": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 1.5,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2 with biases": ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    "smollm3 with windows": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    "glm4": ("glm4", {"head_dim": 8}),
    "glm4 without biases": ("glm4", {"head_dim": 16, "attention_bias": False, "tie_word_embeddings": True}),
    "cohere2": ("cohere2", {"logit_scale": 0.7, "tie_word_embeddings": True, **SLIDING}),
    "cohere2 with biases": (
        "cohere2",
        {"attention_bias": True, "logit_scale": 1.0, "sliding_window_pattern": 2, "sliding_window": 200},
    ),
    "starcoder2": ("starcoder2", {"sliding_window": 9, "tie_word_embeddings": True}),
    "starcoder2 without biases": ("starcoder2", {"use_bias": False}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True, "attn_logit_softcapping": 2.0, **GEMMA}),
    "gemma2 without caps": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True, **GEMMA},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
            **GEMMA,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 9}),
    "mixtral tied": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
    "qwen3 with experts": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "norm_topk_prob": True},
    ),
    "qwen3 with experts, tied": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 8,
            "sliding_window": 5,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "gpt-oss, tied, of full layers": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "swiglu_limit": 0.7,
            "swiglu_alpha": 1.1,
            "layer_types": ["full_attention", "full_attention"],
        },
    ),
    "seed-oss": ("seed_oss", {"head_dim": 16}),
    "seed-oss with all biases, tied": (
        "seed_oss",
        {"head_dim": 8, "attention_out_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "gemma3 with a cap": ("gemma3_text", {"final_logit_softcapping": 3.0, "attention_bias": True, **GEMMA}),
}
"""By name: transformers' `model_type`, and what differs from SHAPE. The first one of a `model_type` goes through the
whole engine (SERVED), so it should be the one with most that is its own."""
_ALSO_SERVED = ("phi3 tied, turned in part", "gpt-oss, tied, of full layers")
SERVED = [
    *{model_type: name for name, (model_type, _) in reversed(MODELS.items())}.values(),
    *_ALSO_SERVED,
]
"""These are generated from, by plain steps and trees, in chunks, and preempted."""


def reference(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of transformers: biases and norms too, so that each of them counts. Sinks are as large as scores
    get, or they would have no share worth mentioning of the weights.

    Args:
        changes: of its configuration.
    """
    torch.manual_seed(seed)
    model_type, options = MODELS[name]
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = CONFIG_MAPPING[model_type](**SHAPE | special | options | changes)
    config._attn_implementation = "eager"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            middle = 4.0 if "sinks" in key else float("norm" in key)
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5) + middle)
    return model
