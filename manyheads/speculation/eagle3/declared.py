"""What the config.json of an EAGLE-3 drafter says: the layouts that are in use, made one.

| layout | told by | fields |
|---|---|---|
| SafeAILab | neither of the others | Llama's, `draft_vocab_size`, `target_hidden_size` |
| SpecForge | `architectures: ["LlamaForCausalLMEagle3"]` | the same, `fc_norm`, `norm_output`, `eagle_config` |
| speculators | `transformer_layer_config` | Llama's (or Qwen3's) in there, the drafter's own beside it |

vLLM 0.26 reads all three, and the drafter's own fields at the top level of the first two as well; so does this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyheads.checkpoint import named_base, read_json
from manyheads.config import CheckpointError, ConfigError
from manyheads.models.rope import LongScaling
from manyheads.models.rope_keys import RopeKeys

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
ONLY: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "logit_scale": 1.0,
    "use_sliding_window": False,
    "quantization_config": None,
}
"""Fields of which one value is supported, which is also what they are where they are absent."""
_READ = {
    *ONLY, *FLAGS, LAYER_IDS, "eagle_config", "architectures", "model_type", "base_model_name_or_path", "hidden_size",
    "target_hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "draft_vocab_size", "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "transformer_layer_config", "speculators_model_type",
}  # fmt: skip


@dataclass(frozen=True)
class Declared:
    """A drafter's config.json."""

    format: str
    """`SafeAILab`, `SpecForge` or `speculators`."""
    fields: dict[str, Any]
    """The fields of `Eagle3Config`, without `qk_norm`."""
    qk_norm: bool | None
    """Whether queries and keys are normed; None where the configuration does not tell and the weights do."""
    base: str | None
    """The base model's name, a hub id or a path."""
    extras: dict[str, Any]
    """All other fields."""


def read_declared(path: Path) -> Declared:
    """Read a drafter's config.json.

    Raises:
        CheckpointError: naming the key that is missing, wrong, or of a value that is not supported.
        ConfigError: there is no such file, it is no JSON, or its rotary embedding is not supported.
    """
    raw = read_json(path)
    layer = raw.get("transformer_layer_config")
    if layer is None:
        form = "SpecForge" if raw.get("architectures") == ["LlamaForCausalLMEagle3"] else "SafeAILab"
        values, qk_norm = raw, None
    else:
        form, values = "speculators", _joined(raw, layer, path)
        qk_norm = values["model_type"] == "qwen3"
    for key, supported in ONLY.items():
        if values.get(key, supported) not in (supported, None):
            raise CheckpointError(f"{path}: {key} {values[key]!r} is not supported, only {supported!r}")
    if "sliding_attention" in (values.get("layer_types") or []):
        raise CheckpointError(f"{path}: layer_types: sliding_attention is not supported, only full_attention")
    extras = {key: value for key, value in values.items() if key not in _READ}
    nested = _nested(values, path)
    if rest := {key: value for key, value in nested.items() if key not in (LAYER_IDS, "norm_before_fc")}:
        extras["eagle_config"] = rest
    return Declared(form, _fields(values, nested, path), qk_norm, named_base(raw), extras)


def _joined(raw: dict[str, Any], layer: object, path: Path) -> dict[str, Any]:
    """The fields of both levels of speculators' layout."""
    kind = raw.get("speculators_model_type")
    if kind != "eagle3":
        raise CheckpointError(f"{path}: speculators_model_type {kind!r} is not supported, only 'eagle3'")
    if not isinstance(layer, dict):
        raise CheckpointError(f"{path}: transformer_layer_config must be an object, not {layer!r}")
    if layer.get("model_type") not in ("llama", "qwen3"):
        raise CheckpointError(
            f"{path}: transformer_layer_config: model_type {layer.get('model_type')!r} is not supported, "
            "only 'llama' and 'qwen3'"
        )
    if "norm_before_residual" not in raw:  # speculators takes false then, and vLLM true
        raise CheckpointError(f"{path}: norm_before_residual is missing, and readers differ in what that means")
    own = {key: raw.get(key) for key in (*FLAGS, LAYER_IDS, "draft_vocab_size", "target_hidden_size")}
    return raw | layer | own


def _nested(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """`eagle_config`, in which SpecForge and NVIDIA's ModelOpt keep some of the fields."""
    nested = values.get("eagle_config") or {}
    if not isinstance(nested, dict):
        raise CheckpointError(f"{path}: eagle_config must be an object, not {nested!r}")
    if not nested.get("use_aux_hidden_state", True):
        raise CheckpointError(
            f"{path}: eagle_config: use_aux_hidden_state False (a drafter that reads the base's last hidden state "
            "alone) is not supported"
        )
    return nested


def _fields(values: dict[str, Any], nested: dict[str, Any], path: Path) -> dict[str, Any]:
    def number(key: str, default: int | None = None) -> int:
        value = values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{path}: {key} must be a positive integer, not {value!r}")
        return value

    def flag(key: str) -> bool:
        value = values.get(key)
        if value not in (None, False, True):
            raise CheckpointError(f"{path}: {key} must be true or false, not {value!r}")
        return bool(value)

    hidden_size, num_heads, vocab_size = number("hidden_size"), number("num_attention_heads"), number("vocab_size")
    num_kv_heads, head_dim = number("num_key_value_heads", num_heads), number("head_dim", hidden_size // num_heads)
    draft_vocab_size = number("draft_vocab_size", vocab_size)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{path}: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"{path}: head_dim {head_dim} is odd, and rotary embedding needs pairs")
    if draft_vocab_size > vocab_size:
        raise CheckpointError(f"{path}: draft_vocab_size {draft_vocab_size} is above the base's {vocab_size} tokens")
    eps = values.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, float) or eps <= 0:
        raise CheckpointError(f"{path}: rms_norm_eps must be a positive number, not {eps!r}")
    longest = number("max_position_embeddings", 2048)
    rope = RopeKeys(values=values, path=path, head_dim=head_dim, max_position_embeddings=longest).read()
    if isinstance(rope.scaling, LongScaling):
        raise ConfigError(f"{path}: rope scaling 'longrope' of a drafter is not supported")
    flags = {key: flag(key) for key in FLAGS}
    flags["norm_before_fc"] = bool(nested.get("norm_before_fc", flags["norm_before_fc"]))
    if flags["norm_before_fc"] and flags["fc_norm"]:
        raise CheckpointError(f"{path}: norm_before_fc and fc_norm exclude each other")
    return {
        "hidden_size": hidden_size,
        "target_hidden_size": number("target_hidden_size", hidden_size),
        "intermediate_size": number("intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "draft_vocab_size": draft_vocab_size,
        "max_position_embeddings": longest,
        "rms_norm_eps": eps,
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "layer_ids": _layer_ids(values.get(LAYER_IDS), nested.get(LAYER_IDS), path),
        **flags,
    }


def _layer_ids(top: Any, nested: Any, path: Path) -> tuple[int, int, int] | None:
    """The layers whose inputs the drafter reads, ascending.

    NOTE: the same name stands for two things. At the top level (speculators; vLLM's `set_aux_hidden_state_layers`) an
    id is a layer whose *input* is read. In `eagle_config` (SpecForge's `resolve_eagle_capture_layers`; SGLang's
    `set_eagle3_layers_to_capture` adds 1) it is a layer whose *output* is read, one less. vLLM 0.26 reads those as if
    they were the others, unless there are some at the top level.
    """

    def three(value: Any, where: str) -> tuple[int, int, int] | None:
        if value is None or value == []:
            return None
        ids: list[Any] = value if isinstance(value, list) else []
        whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
        if len(ids) != 3 or not whole or not ids[0] < ids[1] < ids[2]:
            raise CheckpointError(f"{path}: {where}{LAYER_IDS} must be three ascending layers, not {value!r}")
        return ids[0], ids[1], ids[2]

    inputs, outputs = three(top, ""), three(nested, "eagle_config: ")
    if outputs is None:
        return inputs
    following = outputs[0] + 1, outputs[1] + 1, outputs[2] + 1
    if inputs not in (None, following):
        raise CheckpointError(
            f"{path}: {LAYER_IDS} {list(inputs)} (layers by their inputs) and those of eagle_config "
            f"{list(outputs)} (by their outputs) differ"
        )
    return following
