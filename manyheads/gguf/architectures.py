"""What GGUF calls architectures: a record each says which family it is, and how keys and tensors are called.

Names and meanings are llama.cpp's (`gguf-py/gguf/constants.py`, `convert_hf_to_gguf.py`). A key of the architecture's
own that is not known here is refused by name, since it may change what the model computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from manyheads.config import ConfigError
from manyheads.gguf.file import GgufFile

Config = dict[str, Any]
"""What stands in a config.json."""

_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = _MODULES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI = _MODULES | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_STARCODER = _MODULES | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One of GGUF's architectures."""

    name: str
    """In `general.architecture`."""
    family: str
    """The name of our family (`models/registry.py`), which is that of transformers' class."""
    model_type: str
    own: Callable[[GgufFile, Config], Config]
    """It makes what is special to the architecture of (the file, what all say)."""
    modules: Mapping[str, str] = field(default_factory=lambda: _MODULES)
    """The modules of a layer, by their names in the file."""
    turns_neighbours: bool = False
    """Whether rows of queries and keys are kept in such an order that neighbours of a head turn against each other."""
    norm_offset: float = 0.0
    """What the file's norms are more than the family's."""
    epsilon: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    """What keeps norms from dividing by 0: the file's key and config.json's."""


def read_config(file: GgufFile) -> Config:
    """What would stand in config.json.

    Raises:
        ConfigError: the architecture is not supported, or something that the file says of it.
        CheckpointError: a key is missing, or no number.
    """
    record = architecture_of(file)
    hidden, heads = file.number("embedding_length", int), file.number("attention.head_count", int)
    head_dim = file.number("attention.key_length", int, hidden // heads)
    file.expect("attention.value_length", head_dim)
    file.value(f"{file.architecture}.vocab_size", None)  # which the embedding says as well
    embedding = file.tensor("token_embd.weight")
    if embedding is None:
        raise ConfigError(f"{file.path}: token_embd.weight is missing")
    config = {
        "architectures": [record.family],
        "model_type": record.model_type,
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": hidden,
        "intermediate_size": file.number("feed_forward_length", int),
        "num_hidden_layers": file.number("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.number("attention.head_count_kv", int, heads),
        "max_position_embeddings": file.number("context_length", int),
        record.epsilon[1]: file.number(record.epsilon[0], float),
        "tie_word_embeddings": file.tensor("output.weight") is None,
        "rope_theta": file.number("rope.freq_base", float, 10000.0),
        **_special_tokens(file),
    }
    if head_dim != hidden // heads:
        config["head_dim"] = head_dim
    config |= record.own(file, config | {"head_dim": head_dim})
    file.check_all_asked()
    return config


def architecture_of(file: GgufFile) -> Architecture:
    """The record of a file's architecture. Raises ConfigError naming one that there is none of."""
    if file.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"{file.path}: architecture {file.architecture!r} is not supported; supported are {known}")
    return ARCHITECTURES[file.architecture]


def _special_tokens(file: GgufFile) -> Config:
    """A text ends with the end of a text or of a turn."""
    at = "tokenizer.ggml."
    ends = [file.value(f"{at}{name}_token_id", None) for name in ("eos", "eot", "eom")]
    found: Config = {"eos_token_id": list(dict.fromkeys(int(end) for end in ends if end is not None))}
    for name, key in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        token = file.value(f"{at}{name}_token_id", None)
        found[key] = None if token is None else int(token)
    return found


def _rope(file: GgufFile, config: Config) -> Config:
    """The whole head turns; how frequencies are stretched is said by keys, or by a tensor of factors."""
    file.expect("rope.dimension_count", config["head_dim"])
    factors, longest = file.tensor("rope_freqs.weight"), config["max_position_embeddings"]
    scaling = _scaling(file)
    if factors is None:
        return {} if scaling is None else {"rope_scaling": scaling}
    if scaling is not None:
        raise ConfigError(f"{file.path}: rope.scaling beside rope_freqs.weight is not supported")
    # whatever made them (Llama 3.1's rule mostly), each frequency is divided by its factor
    each = [float(factor) for factor in factors.data]
    rope = {"rope_type": "longrope", "short_factor": each, "long_factor": each, "attention_factor": 1.0}
    return {"rope_scaling": {**rope, "original_max_position_embeddings": longest}}


def _scaling(file: GgufFile) -> Config | None:
    """What keys say of the stretching of rotary embedding."""
    at = f"{file.architecture}.rope.scaling"
    kind = file.value(f"{at}.type", "none")
    file.value(f"{at}.finetuned", None)  # it says nothing of the arithmetic
    factor = file.number("rope.scaling.factor", float, 1.0)
    original = file.number("rope.scaling.original_context_length", int, None)
    if kind == "none":
        file.expect("rope.scaling.factor", 1.0, 0.0)
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and original is not None:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise ConfigError(f"{file.path}: {at}.type {kind!r} is not supported, only none, linear and yarn")


def _llama(file: GgufFile, config: Config) -> Config:
    file.expect("expert_count", 0)
    file.expect("expert_used_count", 0)
    return {"hidden_act": "silu", **_rope(file, config), **_llama_biases(file)}


def _llama_biases(file: GgufFile) -> Config:
    there = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    return {key: file.tensor(name) is not None for key, name in there.items()}


def _qwen2(file: GgufFile, config: Config) -> Config:
    return {"hidden_act": "silu", "use_sliding_window": False, **_rope(file, config)}


def _qwen3(file: GgufFile, config: Config) -> Config:
    return {
        **_qwen2(file, config),
        "head_dim": config["head_dim"],
        "attention_bias": file.tensor("blk.0.attn_q.bias") is not None,
    }


def _phi3(file: GgufFile, config: Config) -> Config:
    """A part of a head turns. Of texts beyond the length that the model first learnt from, the longer factors hold."""
    head_dim, longest = config["head_dim"], config["max_position_embeddings"]
    turned = file.number("rope.dimension_count", int, head_dim)
    window = file.number("attention.sliding_window", int, longest)
    original = file.number("rope.scaling.original_context_length", int, longest)
    own: Config = {
        "hidden_act": "silu",
        "partial_rotary_factor": turned / head_dim,
        "sliding_window": window if window < longest else None,
        "original_max_position_embeddings": original,
    }
    short, long = (file.tensor(f"rope_factors_{kind}.weight") for kind in ("short", "long"))
    if short is not None and long is not None:
        factors = {"short_factor": short.data.tolist(), "long_factor": long.data.tolist()}
        own["rope_scaling"] = {"rope_type": "longrope", **factors}
        own["rope_scaling"]["attention_factor"] = file.number("rope.scaling.attn_factor", float, 1.0)
    return own


def _gemma2(file: GgufFile, config: Config) -> Config:
    file.expect("rope.dimension_count", config["head_dim"])
    return {
        **_gemma(file, config, largest=46),
        "attn_logit_softcapping": file.number("attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": file.number("final_logit_softcapping", float, 30.0),
    }


def _gemma3(file: GgufFile, config: Config) -> Config:
    file.expect("rope.dimension_count", config["head_dim"])
    file.expect("attention.sliding_window_pattern", 6)
    scaling = _scaling(file)
    return {
        **_gemma(file, config, largest=62),
        "rope_theta": file.number("rope.freq_base", float, 1000000.0),
        "rope_local_base_freq": file.number("rope.freq_base_swa", float, 10000.0),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": file.number("final_logit_softcapping", float, None),
        **({} if scaling is None else {"rope_scaling": scaling}),
    }


def _gemma(file: GgufFile, config: Config, largest: int) -> Config:
    """What both Gemmas have. The largest of each, told by its layers, scales scores otherwise, as in llama.cpp."""
    is_largest = config["num_hidden_layers"] == largest
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": config["head_dim"],
        "query_pre_attn_scalar": config["hidden_size"] / config["num_attention_heads"]
        if is_largest
        else config["head_dim"],
        "sliding_window": file.number("attention.sliding_window", int, 4096),
    }


def _starcoder2(file: GgufFile, config: Config) -> Config:
    own = {"hidden_act": "gelu_pytorch_tanh", "sliding_window": None, **_rope(file, config)}
    return {**own, "use_bias": file.tensor("blk.0.attn_q.bias") is not None}


_RECORDS = (
    Architecture(
        name="llama", family="LlamaForCausalLM", model_type="llama", own=_llama, turns_neighbours=True
    ),
    Architecture(name="qwen2", family="Qwen2ForCausalLM", model_type="qwen2", own=_qwen2),
    Architecture(name="qwen3", family="Qwen3ForCausalLM", model_type="qwen3", own=_qwen3),
    Architecture(name="phi3", family="Phi3ForCausalLM", model_type="phi3", own=_phi3, modules=_PHI),
    Architecture(
        name="gemma2", family="Gemma2ForCausalLM", model_type="gemma2", own=_gemma2, modules=_GEMMA, norm_offset=1.0
    ),
    Architecture(
        name="gemma3", family="Gemma3ForCausalLM", model_type="gemma3_text", own=_gemma3, modules=_GEMMA,
        norm_offset=1.0,
    ),
    Architecture(
        name="starcoder2", family="Starcoder2ForCausalLM", model_type="starcoder2", own=_starcoder2,
        modules=_STARCODER, epsilon=("attention.layer_norm_epsilon", "norm_epsilon"),
    ),
)  # fmt: skip
ARCHITECTURES = {record.name: record for record in _RECORDS}
