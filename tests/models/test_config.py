"""What config.json may say: read as transformers reads it, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from manyheads.config import CheckpointError, ConfigError
from manyheads.models.family import Family
from manyheads.models.keys import IRRELEVANT, UNDECLARED
from manyheads.models.loader import load_model
from manyheads.models.registry import FAMILIES, read_config
from tests.forward import logits

torch.set_num_threads(1)

EXAMPLES = int(os.environ.get("CONFIG_EXAMPLES", "40"))
TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}
FEW_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 12}
"""Of families that have any."""
LARGE = 10**7
"""Models of more parameters take too long to be made."""
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_a_family_declares_the_keys_of_transformers_class(family: Family) -> None:
    config_class = CONFIG_MAPPING[family.model_type]
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    declared = {f.name: f.default for f in dataclasses.fields(config_class) if f.name not in common}
    assert {key: value for key, value in family.keys.items() if key in declared} == {
        key: value for key, value in declared.items() if key not in IRRELEVANT
    }


VALUES: dict[str, list[Any]] = {
    "hidden_act": ["silu", "gelu", "gelu_pytorch_tanh", "relu"],
    "num_hidden_layers": [1, 3],
    "num_key_value_heads": [1, 4, None, 3],
    "head_dim": [8, 16, None, 7],
    "hidden_size": [32, 64],
    "max_position_embeddings": [30, 64, 0, None],
    "rms_norm_eps": [1e-2, 1, -1.0, None],
    "rope_theta": [77.0, 10000, None, "10000"],
    "partial_rotary_factor": [0.5, 1.0, None],
    "original_max_position_embeddings": [16, None],
    "sliding_window": [5, 8, 64, None],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 2, 9],
    "layer_types": [
        None,
        ["full_attention"] * 4,
        ["sliding_attention"] * 4,
        ["full_attention", "sliding_attention"] * 2,
        ["full_attention"],
    ],
    "attention_chunk_size": [8, None],
    "is_causal": [False, True],
    "use_bidirectional_attention": [True, None],
    "tie_word_embeddings": [True, False, None],
    "attention_bias": [True, False, "true"],
    "mlp_bias": [True, False],
    "attention_dropout": [0.5],
    "initializer_range": [0.5],
    "model_type": ["llama", "gpt2", None],
    "torch_dtype": ["float32"],
    "pretraining_tp": [2],
    "attention_multiplier": [0.3, 0],
    "embedding_multiplier": [2, None],
    "residual_multiplier": [0.5],
    "logits_scaling": [4.0, "4"],
    "logit_scale": [0.5, 1],
    "final_logit_softcapping": [2.0, None],
    "attn_logit_softcapping": [1.5, None],
    "query_pre_attn_scalar": [16, 3],
    "hidden_activation": ["gelu_pytorch_tanh", "gelu", "silu"],
    "no_rope_layers": [[1, 0, 0, 1], [0, 0, 0, 0], [1], None],
    "no_rope_layer_interval": [2, 3, 0],
    "sliding_window_pattern": [1, 2, 3],
    "rope_local_base_freq": [5.0, None],
    "use_bias": [True, False],
    "num_experts": [3, None],
    "num_local_experts": [3, None],
    "num_experts_per_tok": [1, 3, 9],
    "moe_intermediate_size": [12],
    "norm_topk_prob": [True],
    "decoder_sparse_step": [2],
    "mlp_only_layers": [[], [1]],
    "norm_epsilon": [0.1],
    "layer_norm_eps": [0.1],
    "quantization": [1],
}
"""Keys of real configurations, and what they may be changed to. A missing key is a change as well."""
NUMBERS = [8 * [1.0], 4 * [1.0], [1.0, 1.5, 2.0, 4.0], 2 * [2.0], "x"]
ROPES = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn", "longrope", "su", "mrope"]),
        "type": st.sampled_from(["default", "linear", "yarn", None]),
        "rope_theta": st.sampled_from([50.0, 1e6, None]),
        "factor": st.sampled_from([2.0, 4, None]),
        "low_freq_factor": st.sampled_from([1.0, 2]),
        "high_freq_factor": st.sampled_from([4.0, 1.0]),
        "original_max_position_embeddings": st.sampled_from([12, 24]),
        "attention_factor": st.sampled_from([1.3, None]),
        "beta_fast": st.sampled_from([16, 0]),
        "mscale": st.sampled_from([0.7, 0]),
        "mscale_all_dim": st.sampled_from([1.1]),
        "truncate": st.sampled_from([False]),
        "short_factor": st.sampled_from(NUMBERS),
        "long_factor": st.sampled_from(NUMBERS),
        "partial_rotary_factor": st.sampled_from([0.5, 0.75, 1.0]),
    },
)
COMPLETE = st.sampled_from(
    [
        {"rope_type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16},
        {"type": "yarn", "factor": 2.0},
        {"rope_type": "llama3", "factor": 4, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {"rope_theta": 7.0}},
        {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 4.0], "long_factor": 4 * [4.0]},
    ]
)
CHANGES = st.one_of(
    *(st.tuples(st.just(key), st.sampled_from(values)) for key, values in VALUES.items()),
    st.tuples(st.sampled_from(["rope_scaling", "rope_parameters"]), st.one_of(COMPLETE, COMPLETE, ROPES)),
    st.tuples(st.sampled_from([*VALUES, *TINY]), st.just("missing")),
)


def raw_config(family: Family, changes: list[tuple[str, Any]]) -> dict[str, Any]:
    """A configuration as it is found on the hub, with changes."""
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
        "rope_theta": 100.0,
        "num_experts_per_tok": 2,
        **TINY,
        **{key: value for key, value in FEW_EXPERTS.items() if key in family.keys},
    }
    for key, value in changes:
        if value == "missing":
            raw.pop(key, None)
        else:
            raw[key] = json.loads(json.dumps(value))
    return raw


def theirs(raw: dict[str, Any]) -> Any:
    """The model that transformers makes of a configuration, with random weights; or why there is none to compare with,
    of OUTCOMES."""
    raw = json.loads(json.dumps(raw))
    try:
        if is_large(raw):
            return "too large"
        model_type = raw.pop("model_type")
        config = CONFIG_MAPPING[model_type].from_dict(raw)
        config._attn_implementation = "eager"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5) + ("norm" in key))
        return model
    except Exception:  # whatever it is, there is no text to compare with
        return "transformers cannot"


def is_large(raw: dict[str, Any]) -> bool:
    """Whether transformers would make a model of more than LARGE parameters: what is missing is as in a real one."""
    with torch.device("meta"):
        config = CONFIG_MAPPING[raw["model_type"]].from_dict({k: v for k, v in raw.items() if k != "model_type"})
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) > LARGE


def outcome(family: Family, changes: list[tuple[str, Any]], length: int) -> str:
    """Compares the logits of a changed configuration with transformers', and says what came of it: one of OUTCOMES.

    Raises:
        AssertionError: a text of ours would be another.
    """
    raw = raw_config(family, changes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(raw))
        try:
            config = read_config(folder)
        except ConfigError as error:
            assert str(folder / "config.json") in str(error)  # noqa: PT017
            return "refused"
        model = theirs(raw | {"model_type": family.model_type})
        if isinstance(model, str):
            return model
        model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(raw))
        try:
            ours = load_model(folder, config, torch.float32, CPU)
        except CheckpointError:
            return "refused"
    length = min(length, config.max_position_embeddings)
    tokens = torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        wanted = model(tokens[None]).logits[0]
    torch.testing.assert_close(logits(ours, tokens), wanted, atol=2e-3, rtol=2e-3)
    return "equal"


OUTCOMES = ("equal", "refused", "transformers cannot", "too large")
CHANGED = {
    "family": st.sampled_from(sorted(FAMILIES.values(), key=lambda family: family.model_type)),
    "changes": st.lists(CHANGES, min_size=1, max_size=3),
    "length": st.integers(2, 40),
}
"""What `outcome` takes."""
LOOK: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
"""Settings of hypothesis for it."""


@settings(max_examples=EXAMPLES, derandomize="CONFIG_EXAMPLES" not in os.environ, **LOOK)
@given(**CHANGED)
def test_a_config_is_refused_or_gives_transformers_text(
    family: Family, changes: list[tuple[str, Any]], length: int
) -> None:
    assert outcome(family, changes, length) in OUTCOMES


def test_a_model_of_real_sizes_is_not_made() -> None:
    (llama,) = (family for family in FAMILIES.values() if family.model_type == "llama")
    assert outcome(llama, [("hidden_size", "missing"), ("intermediate_size", "missing")], 2) == "too large"
    assert outcome(llama, [("num_key_value_heads", "missing")], 2) == "equal"
    assert outcome(llama, [("is_causal", False)], 2) == "refused"


@pytest.mark.parametrize("key", sorted(UNDECLARED.keys() - {"original_max_position_embeddings"}))
def test_a_key_that_transformers_looks_at_anyway_is_not_ignored(tmp_path: Path, key: str) -> None:
    raw = raw_config(FAMILIES["LlamaForCausalLM"], [(key, "strange")])
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=f"config.json: .*{key}|{key.replace('rope_scaling', 'rope parameters')}"):
        read_config(tmp_path)
