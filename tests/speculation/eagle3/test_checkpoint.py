"""EAGLE-3 drafters read in every layout, and what is wrong with them named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyheads.config import CheckpointError, ConfigError, EngineConfig
from manyheads.models.rope import Llama3Scaling
from manyheads.speculation.eagle3.checkpoint import Eagle3Weights, is_eagle3, read_drafter
from manyheads.speculation.eagle3.drafter import Eagle3Source
from manyheads.speculation.kinds import find_drafter
from manyheads.speculation.medusa.checkpoint import locate_heads, split_model
from tests.eagle3 import LAYER_IDS, ReferenceEagle3, drafter_config, make_drafter, random_state, raw_config, write_state
from tests.tiny import model_config, save_model

VOCAB, HIDDEN, DRAFT = 40, 32, 24
BASE = model_config(num_layers=8, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=VOCAB, hidden_size=HIDDEN)
FORMATS = {"safeailab": "SafeAILab", "specforge": "SpecForge", "speculators": "speculators"}
STATE = random_state(drafter_config(BASE, DRAFT), 0)
State = dict[str, Tensor]


def same(a: Eagle3Weights, b: Eagle3Weights) -> bool:
    alike = a.tensors.keys() == b.tensors.keys() and a.config == b.config
    return alike and all(torch.equal(tensor, b.tensors[key]) for key, tensor in a.tensors.items())


def write(folder: Path, state: State = STATE, **changes: Any) -> Path:
    """A drafter in SafeAILab's layout, with changes of its config.json; None takes a field out."""
    raw = raw_config(drafter_config(BASE, DRAFT), "safeailab") | changes
    return write_state(folder, state, {key: value for key, value in raw.items() if value is not None})


# what is in use is read


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_every_layout_is_read_alike(tmp_path: Path, form: str, pickled: bool) -> None:
    weights = make_drafter(tmp_path, BASE, draft_vocab=DRAFT, format=form, pickled=pickled, base_name="name/base")
    assert is_eagle3(tmp_path)
    assert weights.format == FORMATS[form]
    assert weights.config == drafter_config(BASE, DRAFT)
    assert weights.base == "name/base"
    assert weights.extras["initializer_range"] == 0.02
    assert weights.tensors.keys() == STATE.keys() - {"t2d"}
    assert all(torch.equal(tensor, STATE[key]) for key, tensor in weights.tensors.items())
    assert weights.embedding is None
    tokens = weights.token_map
    assert tokens is not None
    assert torch.equal(tokens, STATE["t2d"].nonzero().flatten())
    assert same(read_drafter(tmp_path, None), weights)


def test_shards_are_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(STATE)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        save_file({name: STATE[name] for name in part}, tmp_path / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert is_eagle3(tmp_path)
    assert torch.equal(read_drafter(tmp_path, BASE).tensors["fc.weight"], STATE["fc.weight"])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "changes",
    [
        {"norm_before_residual": True},
        {"norm_before_fc": True},
        {"fc_norm": True, "norm_output": True},
        {"qk_norm": True},
        {"head_dim": 16},
        {"hidden_size": 16, "embedding": "random"},
        {"rope_theta": 5e5, "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 8192)},
        {"layer_ids": (1, 3, 8)},
    ],
)
def test_every_switch_is_read_in_every_layout(tmp_path: Path, form: str, changes: dict[str, Any]) -> None:
    weights = make_drafter(tmp_path, BASE, draft_vocab=DRAFT, format=form, **changes)
    for name, value in changes.items():
        assert name == "embedding" or getattr(weights.config, name) == value
    reference = ReferenceEagle3(weights, torch.randn(VOCAB, HIDDEN))
    states, tokens = torch.randn(7, 3 * HIDDEN), torch.arange(7)
    logits = reference.after(states, tokens, [5, 3])
    assert int(logits.isfinite().sum()) == DRAFT
    plain = replace(weights, config=replace(weights.config, norm_before_residual=False, norm_output=False))
    differs = not torch.equal(logits, ReferenceEagle3(plain, reference.embedding).after(states, tokens, [5, 3]))
    assert differs == (weights.config.norm_before_residual or weights.config.norm_output)


def test_the_same_vocabulary_needs_no_map(tmp_path: Path) -> None:
    weights = make_drafter(tmp_path / "plain", BASE, embedding=torch.ones(VOCAB, HIDDEN))
    assert weights.token_map is None
    assert weights.embedding is not None
    state = load_file(tmp_path / "plain" / "model.safetensors")
    nothing = {"d2t": torch.zeros(VOCAB, dtype=torch.int64)}
    for t2d in (torch.ones(VOCAB, dtype=torch.bool), torch.zeros(VOCAB, dtype=torch.bool)):  # SpecForge's, SafeAILab's
        folder = write(tmp_path / str(bool(t2d[0])), state | nothing | {"t2d": t2d}, draft_vocab_size=VOCAB)
        assert same(read_drafter(folder, BASE), weights)
    folder = write(tmp_path / "undeclared", state, draft_vocab_size=None)
    assert same(read_drafter(folder, BASE), weights)


def test_layers_are_by_input_at_the_top_and_by_output_in_eagle_config(tmp_path: Path) -> None:
    nested = {"eagle_config": {LAYER_IDS: [0, 2, 4]}}
    assert read_drafter(write(tmp_path, **nested), BASE).config.layer_ids == (1, 3, 5)
    assert read_drafter(write(tmp_path, **nested, **{LAYER_IDS: [1, 3, 5]}), BASE).config.layer_ids == (1, 3, 5)
    with pytest.raises(CheckpointError, match=r"\[0, 2, 4\] \(layers by their inputs\) and .* \[0, 2, 4\] .* differ"):
        read_drafter(write(tmp_path, **nested, **{LAYER_IDS: [0, 2, 4]}), BASE)
    assert read_drafter(write(tmp_path), BASE).config.feature_layers(32) == (2, 16, 29)


def test_statistics_come_along(tmp_path: Path) -> None:
    assert read_drafter(write(tmp_path), BASE).accuracy is None
    (tmp_path / "tree_statistics.json").write_text('{"accuracy": [[0.5, 0.25]]}')
    assert read_drafter(tmp_path, BASE).accuracy == [[0.5, 0.25]]


# what is wrong is named: file, key, and what is needed


def without(*keys: str) -> State:
    return {key: tensor for key, tensor in STATE.items() if key not in keys}


def changed(key: str, change: Callable[[Tensor], Tensor]) -> State:
    return STATE | {key: change(STATE[key].clone())}


def put(index: int, value: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([index]), value)


BAD: dict[str, tuple[State, str]] = {
    "no fc": (without("fc.weight"), r"key fc.weight is missing; needed is \(32, 96\) in floating point"),
    "no k": (without("midlayer.self_attn.k_proj.weight"), r"k_proj.weight is missing; needed is \(16, 64\)"),
    "no projection": (without("lm_head.weight"), r"key lm_head.weight is missing; needed is \(24, 32\)"),
    "no d2t": (without("d2t"), r"key d2t is missing; needed is \(24,\) in torch.int64"),
    "neither map": (without("d2t", "t2d"), r"key d2t is missing; needed is \(24,\)"),
    "unused": (
        STATE | {"midlayer.self_attn.q_proj.bias": torch.ones(32)},
        r"q_proj.bias belongs to no EAGLE-3 drafter",
    ),
    "another layer": (
        STATE | {"layers.1.mlp.up_proj.weight": torch.ones(2)},
        r"key layers.1.mlp.up_proj.weight belongs",
    ),
    "half a layer twice": (STATE | {"layers.0.hidden_norm.weight": torch.ones(HIDDEN)}, "are the same weight"),
    "norm of 3.1": (STATE | {"fc_norm.0.weight": torch.ones(HIDDEN)}, r"key fc_norm.0.weight belongs to no .* config"),
    "wide q": (changed("midlayer.self_attn.q_proj.weight", lambda t: t[:, :32]), r"has shape \(32, 32\).*\(32, 64\)"),
    "short head": (changed("lm_head.weight", lambda t: t[:20]), r"lm_head.weight has shape \(20, 32\).*\(24, 32\)"),
    "integers": (changed("norm.weight", lambda t: t.to(torch.int8)), r"norm.weight has shape \(32,\) in torch.int8"),
    "not finite": (changed("fc.weight", lambda t: t / 0), r"key fc.weight holds values that are not finite"),
    "embedding": (
        STATE | {"embed_tokens.weight": torch.ones(9, 32)},
        r"embed_tokens.weight has shape \(9, 32\).*\(40, 32",
    ),
    "d2t of another type": (changed("d2t", lambda t: t.int()), r"d2t has shape \(24,\) in torch.int32; .*torch.int64"),
    "d2t too short": (changed("d2t", lambda t: t[:9]), r"d2t has shape \(9,\)"),
    "d2t too high": (changed("d2t", put(23, 17)), r"d2t takes draft token 23 to 40, outside the vocabulary of 40"),
    "d2t negative": (changed("d2t", put(2, -3)), r"d2t takes draft token 2 to -1, outside"),
    "d2t twice": (
        changed("d2t", lambda t: torch.cat([t[:1], t[:1] - 1, t[2:]])),
        "several draft tokens to the same token",
    ),
    "t2d of another type": (changed("t2d", lambda t: t.int()), r"t2d has shape \(40,\) in torch.int32; .*torch.bool"),
    "t2d disagrees": (changed("t2d", lambda t: ~t), r"key t2d and d2t disagree about token 0"),
    "t2d unset": (changed("t2d", torch.zeros_like), r"key t2d and d2t disagree about token"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_weights_are_named(tmp_path: Path, bad: str) -> None:
    state, message = BAD[bad]
    folder = write(tmp_path, {key: tensor.contiguous() for key, tensor in state.items()})
    with pytest.raises(CheckpointError, match=message) as caught:
        read_drafter(folder, BASE)
    assert str(folder / "model.safetensors") in str(caught.value)


def test_a_reordered_vocabulary_is_not_guessed_at(tmp_path: Path) -> None:
    state = random_state(drafter_config(BASE), 0) | {"d2t": torch.tensor([1, -1] + [0] * 38)}
    with pytest.raises(CheckpointError, match="d2t reorders a whole vocabulary"):
        read_drafter(write(tmp_path, state, draft_vocab_size=VOCAB), BASE)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no hidden size": ({"hidden_size": None}, "hidden_size must be a positive integer, not None"),
    "text": ({"draft_vocab_size": "24"}, "draft_vocab_size must be a positive integer, not '24'"),
    "too many drafts": ({"draft_vocab_size": 41}, "draft_vocab_size 41 is above the base's 40 tokens"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of .* 3"),
    "odd heads": ({"head_dim": 7}, "head_dim 7 is odd"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
    "layers": ({"num_hidden_layers": 2}, "num_hidden_layers 2 is not supported, only 1"),
    "biases": ({"attention_bias": True}, "attention_bias True is not supported, only False"),
    "window": ({"layer_types": ["sliding_attention"]}, "sliding_attention is not supported"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .* is not supported"),
    "eps": ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a positive number, not 0.0"),
    "switch": ({"norm_output": "yes"}, "norm_output must be true or false, not 'yes'"),
    "both norms": ({"norm_before_fc": True, "fc_norm": True}, "norm_before_fc and fc_norm exclude each other"),
    "two layers read": ({LAYER_IDS: [1, 2]}, rf"{LAYER_IDS} must be three ascending layers, not \[1, 2\]"),
    "layers out of order": ({LAYER_IDS: [4, 2, 6]}, "must be three ascending layers"),
    "layers that are not there": ({LAYER_IDS: [2, 4, 9]}, r"names layers \(2, 4, 9\); the base has 8"),
    "the last state alone": ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state False"),
    "nested layers": ({"eagle_config": {LAYER_IDS: [-1, 1, 2]}}, f"eagle_config: {LAYER_IDS} must be three"),
    "no object": ({"eagle_config": [1]}, "eagle_config must be an object"),
    "another base": ({"target_hidden_size": 64}, "for a base with a hidden size of 64; this one's is 32"),
    "another vocabulary": ({"vocab_size": 41}, "for a base with a vocabulary of 41; this one's is 40"),
}


@pytest.mark.parametrize("bad", BAD_CONFIGS)
def test_bad_configurations_are_named(tmp_path: Path, bad: str) -> None:
    changes, message = BAD_CONFIGS[bad]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_drafter(write(tmp_path, **changes), BASE)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_before_residual": None}, "norm_before_residual is missing, and readers differ in what that means"),
        ({"speculators_model_type": "peagle"}, "speculators_model_type 'peagle' is not supported, only 'eagle3'"),
        ({"transformer_layer_config": {"model_type": "gpt_oss"}}, "model_type 'gpt_oss' is not supported"),
        ({"transformer_layer_config": 7}, "transformer_layer_config must be an object, not 7"),
    ],
)
def test_bad_speculators_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    raw = raw_config(drafter_config(BASE, DRAFT), "speculators") | changes
    raw = {key: value for key, value in raw.items() if value is not None or key not in changes}
    with pytest.raises(CheckpointError, match=message):
        read_drafter(write_state(tmp_path, STATE, raw, "speculators"), BASE)


def test_norms_that_are_promised_must_be_there(tmp_path: Path) -> None:
    for format, key in (("safeailab", "fc_norm"), ("speculators", "norm_before_fc")):
        raw = raw_config(drafter_config(BASE, DRAFT), format) | {key: True}
        with pytest.raises(CheckpointError, match=r"(fc_norm.0|input_norm).weight is missing; needed is \((32|96),\)"):
            read_drafter(write_state(tmp_path, STATE, raw, format), BASE)
    raw = raw_config(drafter_config(BASE, DRAFT, qk_norm=True), "speculators")
    with pytest.raises(CheckpointError, match=r"key layers.0.self_attn.q_norm.weight is missing; needed is \(8,\)"):
        read_drafter(write_state(tmp_path, STATE, raw, "speculators"), BASE)


def test_another_width_needs_an_embedding(tmp_path: Path) -> None:
    config = drafter_config(BASE, DRAFT, hidden_size=16)
    folder = write_state(tmp_path, random_state(config, 0), raw_config(config, "safeailab"))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is missing; needed is \(40, 16\)"):
        read_drafter(folder, BASE)


def test_a_small_base_needs_its_layers_named(tmp_path: Path) -> None:
    small = replace(BASE, num_layers=2)
    with pytest.raises(
        CheckpointError, match=rf"names no {LAYER_IDS}, which means layers \(2, 1, -1\); the base has 2"
    ):
        read_drafter(write(tmp_path), small)
    assert make_drafter(tmp_path, small).config.layer_ids == (0, 1, 2)


def test_files_that_are_damaged_or_gone_are_named(tmp_path: Path) -> None:
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    for reads in (is_eagle3, lambda folder: read_drafter(folder, BASE)):
        with pytest.raises(CheckpointError, match=f"{file} is damaged"):
            reads(tmp_path)
    file.unlink()
    assert not is_eagle3(tmp_path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_drafter(tmp_path, BASE)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json does not exist"):
        read_drafter(tmp_path, BASE)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    make_drafter(tmp_path, BASE, pickled=True)
    torch.save(STATE | {"x": shutil.rmtree}, tmp_path / "pytorch_model.bin")
    for reads in (is_eagle3, lambda folder: read_drafter(folder, BASE)):
        with pytest.raises(CheckpointError, match=r"cannot be read as plain tensors.*nothing in it was run"):
            reads(tmp_path)


# the kind is told by the folder


def test_heads_and_models_are_no_drafter(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    assert not is_eagle3(tmp_path / "base")
    assert not is_eagle3(tmp_path / "base" / "heads")


def test_a_drafter_names_its_base(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    base = str(tmp_path / "base")
    for form in FORMATS:
        folder = tmp_path / form
        make_drafter(folder, BASE, format=form, base_name=base)
        assert split_model(str(folder), None) == (Path(base), folder)
        assert locate_heads(str(folder)) == (folder, base)
        make_drafter(folder, BASE, format=form)
        assert split_model(base, str(folder)) == (Path(base), folder)
        assert locate_heads(str(folder)) == (folder, None)
        with pytest.raises(
            ConfigError, match=f"holds a drafter that names no base model; give that, and --heads {folder}"
        ):
            split_model(str(folder), None)


def test_a_drafter_is_not_taken_for_heads(tmp_path: Path) -> None:
    make_drafter(tmp_path, BASE)
    assert isinstance(find_drafter(EngineConfig(), tmp_path, BASE), Eagle3Source)
