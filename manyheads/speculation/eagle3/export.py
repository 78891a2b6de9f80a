"""EAGLE-3 drafters to disk, in every layout that is in use (checkpoint.py reads them); vLLM 0.26 loads all of them.

| format | for | can hold |
|---|---|---|
| safeailab | SafeAILab/EAGLE | EAGLE-3 as published: no other layers or norms, no rotary scaling but `linear` |
| specforge | SpecForge, SGLang | other layers, `llama3` scaling, EAGLE-3.1 (`fc_norm`, `norm_output`) |
| speculators | vllm-project/speculators | everything |

What a format cannot say is refused. Nothing else is lost: fields of config.json that no drafting depends on go along.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.config import ConfigError
from manyheads.models.config import ModelConfig
from manyheads.models.rope import YarnScaling
from manyheads.models.rope_keys import magnitude
from manyheads.speculation.eagle3.checkpoint import LAYER, SPECULATORS_LAYER, Eagle3Config, Eagle3Weights
from manyheads.speculation.eagle3.declared import FLAGS, LAYER_IDS
from manyheads.speculation.medusa.checkpoint import STATISTICS
from manyheads.speculation.medusa.export import replace, save_tensors, write_json

FORMATS = ("safeailab", "specforge", "speculators")
DRAFTS = 3
"""Tokens that speculators' configuration proposes at a time unless the drafter came with another one."""
_TOP_LEVEL = ("speculators_config", "speculators_version", "embed_requires_grad")
"""Fields that speculators keeps beside its `transformer_layer_config`, and that are not read here."""


def write_drafter(
    weights: Eagle3Weights,
    out: Path,
    form: str,
    *,
    base: str | None,
    model: ModelConfig | None = None,
    statistics: Path | None = None,
) -> None:
    """Write a folder of a drafter; every file appears whole or not at all.

    Args:
        weights: as read or trained.
        form: one of FORMATS.
        base: the base model: a hub id, `builtin`, or a local folder's absolute path.
        model: of the base, where it is at hand: for its architecture, and its number of layers.
        statistics: a tree_statistics.json to go with the drafter.

    Raises:
        ConfigError: the format cannot hold this drafter; the message says why.
    """
    if form not in FORMATS:
        raise ConfigError(f"unknown format {form!r}; there are: {', '.join(FORMATS)}")
    if reasons := _refusals(weights.config, form, model):
        raise ConfigError(f"the {form} format cannot say {', nor '.join(reasons)}; the speculators format can")
    if form == "speculators" and base is None:
        raise ConfigError("the speculators format names the base model, and this drafter names none; give --base")
    config = _speculators(weights, base, model) if form == "speculators" else _flat(weights, form, base)
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(out / "model.safetensors", _state(weights, form))
    write_json(out / "config.json", config)
    if statistics is not None and statistics.is_file() and statistics.resolve() != (out / STATISTICS).resolve():
        replace(out / STATISTICS, lambda path: shutil.copyfile(statistics, path))


def _refusals(config: Eagle3Config, form: str, model: ModelConfig | None) -> list[str]:
    """What of this drafter the format has no words for, or whose readers pass over."""
    if form == "speculators":
        return []
    unsaid = ["norm_before_residual", "norm_before_fc", "qk_norm"]
    reasons = []
    if form == "safeailab":
        unsaid += ["fc_norm", "norm_output"]
        if not _has_default_layers(config, model):
            reasons.append(f"that the drafter reads layers {config.layer_ids}")
        if config.num_heads * config.head_dim != config.hidden_size:
            reasons.append(f"that {config.num_heads} heads have {config.head_dim} dimensions each")
        if scaling := config.rope_scaling:
            if scaling.kind != "linear":
                reasons.append(f"rotary scaling {scaling.kind}")
            elif config.rope_theta != 10000.0:
                reasons.append(f"rotary scaling with a base of {config.rope_theta:g}")
    elif config.layer_ids and config.layer_ids[0] == 0:  # it names layers by their outputs
        reasons.append(f"that the drafter reads layers {config.layer_ids}")
    return [name for name in unsaid if getattr(config, name)] + reasons


def _has_default_layers(config: Eagle3Config, model: ModelConfig | None) -> bool:
    if config.layer_ids is None:
        return True
    return model is not None and config.layer_ids == (2, model.num_layers // 2, model.num_layers - 3)


def _state(weights: Eagle3Weights, form: str) -> dict[str, Tensor]:
    state = dict(weights.tensors)
    if (tokens := weights.token_map) is not None:
        state["t2d"] = torch.zeros(weights.config.vocab_size, dtype=torch.bool).index_fill_(0, tokens, True)
    if form != "speculators":
        return state
    return {key.replace(LAYER, SPECULATORS_LAYER): tensor for key, tensor in state.items()}


def _layer(weights: Eagle3Weights) -> dict[str, Any]:
    """The fields that a Llama of one layer has too.

    NOTE: `tie_word_embeddings` is false whatever the source said: SGLang takes it at its word.
    """
    config = weights.config
    return {
        **weights.extras,
        "model_type": "qwen3" if config.qk_norm else "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def _rope_scaling(config: Eagle3Config) -> dict[str, Any] | None:
    """As transformers 4 spells it, which all readers know; SafeAILab reads `type`."""
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"type": "linear", "rope_type": "linear", "factor": scaling.factor}
    said = {"rope_type": scaling.kind, **asdict(scaling)}
    if isinstance(scaling, YarnScaling):
        # vLLM passes over attention_factor: it multiplies what follows from the factor by this
        said["attn_factor"] = scaling.attention_factor / magnitude(scaling.factor, 1.0)
    return said


def _flat(weights: Eagle3Weights, form: str, base: str | None) -> dict[str, Any]:
    """SafeAILab's layout, and SpecForge's."""
    config = weights.config
    architecture = "LlamaForCausalLM" if form == "safeailab" else "LlamaForCausalLMEagle3"
    result = {"architectures": [architecture], **_layer(weights), "draft_vocab_size": config.draft_vocab_size}
    # SafeAILab does not take the base's embedding where this is there
    if config.target_hidden_size != config.hidden_size:
        result["target_hidden_size"] = config.target_hidden_size
    # SpecForge of July 2026 takes norm_output false for a third thing, so that false is left out
    result |= {flag: True for flag in FLAGS if getattr(config, flag)}
    if form == "specforge" and config.layer_ids is not None:
        nested = {LAYER_IDS: [i - 1 for i in config.layer_ids]}  # layers by their outputs, for SpecForge and SGLang
        result |= {LAYER_IDS: list(config.layer_ids), "eagle_config": result.get("eagle_config", {}) | nested}
    if base is not None:
        result["base_model_name_or_path"] = base
    return result


def _speculators(weights: Eagle3Weights, base: str | None, model: ModelConfig | None) -> dict[str, Any]:
    """The drafter's own fields, and those of its layer in an object."""
    config = weights.config
    layer = _layer(weights)
    top = {key: layer.pop(key) for key in _TOP_LEVEL if key in layer}
    architecture = {} if model is None else {"architectures": [model.architecture]}
    came_with = top.get("speculators_config", {})
    verifier = {"architectures": []} | came_with.get("verifier", {}) | architecture | {"name_or_path": base}
    proposal = {"proposal_type": "greedy", "speculative_tokens": DRAFTS}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        **top,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            **came_with,
            "verifier": verifier,
        },
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        LAYER_IDS: None if config.layer_ids is None else list(config.layer_ids),
        **{flag: getattr(config, flag) for flag in FLAGS},
        "transformer_layer_config": layer,
    }
