"""EAGLE-3 drafters written in every format: lossless, as vLLM loads them, and refused where a format has no words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from manyheads.cli import main
from manyheads.cli.heads import EAGLE3_FORMATS
from manyheads.config import ConfigError
from manyheads.models.registry import read_config
from manyheads.models.rope import LinearScaling, Llama3Scaling, YarnScaling
from manyheads.speculation.eagle3.checkpoint import Eagle3Weights, read_drafter
from manyheads.speculation.eagle3.export import FORMATS, write_drafter
from tests.eagle3 import LAYER_IDS, make_drafter
from tests.tiny import make_model, model_config

VOCAB, HIDDEN, DRAFT = 40, 32, 24
BASE = model_config(num_layers=8, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=VOCAB, hidden_size=HIDDEN)
LLAMA3 = {"rope_theta": 5e5, "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 8192)}
Capture = pytest.CaptureFixture[str]


def convert(source: Path, out: Path, form: str, *more: str) -> int:
    return main(["convert", str(source), str(out), "--to", form, *more])


def same(a: Eagle3Weights, b: Eagle3Weights) -> bool:
    alike = a.tensors.keys() == b.tensors.keys() and a.config == b.config and a.base == b.base
    return alike and all(torch.equal(tensor, b.tensors[key]) for key, tensor in a.tensors.items())


HELD: list[tuple[str, dict[str, Any]]] = [
    *((form, {"draft_vocab": DRAFT}) for form in FORMATS),
    *((form, {"embedding": "random", "rope_theta": 5e5}) for form in FORMATS),
    *((form, {"draft_vocab": DRAFT, "hidden_size": 16, "head_dim": 4, "embedding": "random"}) for form in FORMATS),
    *((form, {"rope_theta": 10000.0, "rope_scaling": LinearScaling(4.0)}) for form in FORMATS),
    *((form, {"draft_vocab": DRAFT, "fc_norm": True, "norm_output": True}) for form in FORMATS[1:]),
    *((form, {"head_dim": 16, "layer_ids": (1, 4, 8), **LLAMA3}) for form in FORMATS[1:]),
    ("speculators", {"norm_before_residual": True, "norm_before_fc": True, "layer_ids": (0, 4, 8)}),
    ("speculators", {"draft_vocab": DRAFT, "qk_norm": True}),
]


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize(("form", "changes"), HELD)
def test_there_and_back_is_lossless(tmp_path: Path, form: str, changes: dict[str, Any], source: str) -> None:
    first = tmp_path / "first"
    weights = make_drafter(first, BASE, format=source, base_name="name/base", **changes)
    (first / "tree_statistics.json").write_text('{"accuracy": [[0.5, 0.25], [0.5, 0.1]]}')
    assert convert(first, tmp_path / "there", form) == 0
    there = read_drafter(tmp_path / "there", BASE)
    assert same(there, weights)
    assert there.accuracy == [[0.5, 0.25], [0.5, 0.1]]
    assert convert(tmp_path / "there", tmp_path / "back", "speculators") == 0
    back = read_drafter(tmp_path / "back", BASE)
    assert same(back, weights)
    for key, value in weights.extras.items():
        if key == "speculators_config":  # with the number of drafts that it came with
            assert back.extras[key] == value
            assert value["proposal_methods"][0]["speculative_tokens"] == 5
        else:
            assert there.extras[key] == back.extras[key] == value
    assert not list(tmp_path.rglob(".*"))


# vLLM 0.26: what its loader expects (models/llama_eagle3.py and qwen3_eagle3.py: LlamaModel, Eagle3LlamaForCausalLM and
# their load_weights) of a configuration as it takes it (configs/speculators/algos.py, configs/eagle.py)


def vllm_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The flat configuration that vLLM makes of config.json, with its defaults, and the class that it takes."""
    if raw.get("model_type") is None and raw.get("speculators_config") is not None:
        assert raw["speculators_model_type"] == "eagle3"
        assert raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"] >= 1
        assert raw["speculators_config"]["verifier"]["name_or_path"]
        flat = dict(raw["transformer_layer_config"])
        flat |= {key: raw.get(key, False) for key in ("norm_before_fc", "fc_norm", "norm_output")}
        flat["norm_before_residual"] = raw.get("norm_before_residual", True)
        flat["draft_vocab_size"] = raw.get("draft_vocab_size")
        flat |= {key: raw[key] for key in ("target_hidden_size", LAYER_IDS) if raw.get(key) is not None}
        flat["class"] = {"qwen3": "Eagle3Qwen3ForCausalLM", "llama": "Eagle3LlamaForCausalLM"}[flat["model_type"]]
        return flat
    (name,) = raw["architectures"]
    assert raw["model_type"] == "llama"
    return raw | {"class": name if name.endswith("Eagle3") else f"Eagle3{name}"}


def vllm_parameters(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that vLLM can take; `d2t` where it would otherwise guess from all tokens."""
    hidden, target = config["hidden_size"], config.get("target_hidden_size", config["hidden_size"])
    dim, inner = config["head_dim"], config["intermediate_size"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    layer: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{name}_proj": (rows, 2 * hidden) for name, rows in (("q", q), ("k", kv), ("v", kv))},
        "self_attn.o_proj": (hidden, q),
        **{"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)},
        **dict.fromkeys(("input_layernorm", "hidden_norm", "post_attention_layernorm"), (hidden,)),
    }
    if config["class"] == "Eagle3Qwen3ForCausalLM":
        layer |= {"self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,)}
    expected = {f"layers.0.{name}.weight": shape for name, shape in layer.items()}
    drafts = config.get("draft_vocab_size") or config["vocab_size"]
    expected |= {"fc.weight": (hidden, 3 * target), "norm.weight": (hidden,), "lm_head.weight": (drafts, hidden)}
    if config.get("norm_before_fc"):
        expected["input_norm.weight"] = (3 * target,)
    if config.get("fc_norm"):
        expected |= {f"fc_norm.{i}.weight": (target,) for i in range(3)}
    if drafts != config["vocab_size"]:
        expected["d2t"] = (drafts,)
    if hidden != target:
        expected["embed_tokens.weight"] = (config["vocab_size"], hidden)
    return expected


@pytest.mark.parametrize(("form", "changes"), HELD)
def test_vllm_finds_every_key_and_no_other(tmp_path: Path, form: str, changes: dict[str, Any]) -> None:
    weights = make_drafter(tmp_path / "first", BASE, format="speculators", base_name="name/base", **changes)
    assert convert(tmp_path / "first", tmp_path / "out", form) == 0
    config = vllm_config(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert config["class"] in ("Eagle3LlamaForCausalLM", "Eagle3Qwen3ForCausalLM", "LlamaForCausalLMEagle3")
    state = {
        key.replace("midlayer.", "layers.0."): tuple(tensor.shape)
        for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
        if key != "t2d"  # vLLM passes over it
    }
    if "embedding" in changes:
        assert state["embed_tokens.weight"] == (VOCAB, weights.config.hidden_size)
        state.pop("embed_tokens.weight")
    assert state == {key: shape for key, shape in vllm_parameters(config).items() if key != "embed_tokens.weight"}
    for flag in ("norm_before_residual", "norm_output"):
        assert config.get(flag, False) == getattr(weights.config, flag)
    assert config.get(LAYER_IDS) == (list(weights.config.layer_ids) if weights.config.layer_ids else None)
    assert config["hidden_act"] == "silu"
    assert config["tie_word_embeddings"] is False
    assert config.get("rope_theta") == weights.config.rope_theta


@pytest.mark.parametrize("form", FORMATS[1:])
@pytest.mark.parametrize("attention_factor", [0.1 * math.log(4) + 1, 1.0], ids=["YaRN's", "another"])
def test_vllm_finds_the_attention_factor(tmp_path: Path, form: str, attention_factor: float) -> None:
    """It does not read `attention_factor` (YaRNScalingRotaryEmbedding: yarn_get_mscale(factor) * attn_factor)."""
    scaling = YarnScaling(4.0, 64, attention_factor)
    weights = make_drafter(tmp_path / "first", BASE, base_name="name/base", format="specforge", rope_scaling=scaling)
    assert convert(tmp_path / "first", tmp_path / "out", form) == 0
    said = vllm_config(json.loads((tmp_path / "out" / "config.json").read_text()))["rope_scaling"]
    assert (0.1 * math.log(said["factor"]) + 1) * said.get("attn_factor", 1) == pytest.approx(attention_factor)
    assert same(weights, read_drafter(tmp_path / "out", BASE))


def test_specforge_and_sglang_find_their_layers(tmp_path: Path) -> None:
    """They name layers by their outputs, and nest the field."""
    make_drafter(tmp_path / "first", BASE, format="speculators", layer_ids=(1, 4, 8), base_name="name/base")
    assert convert(tmp_path / "first", tmp_path / "out", "specforge") == 0
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["eagle_config"][LAYER_IDS] == [0, 3, 7]
    assert raw["architectures"] == ["LlamaForCausalLMEagle3"]
    assert "norm_output" not in raw
    assert "t2d" not in load_file(tmp_path / "out" / "model.safetensors")


def test_t2d_is_written_with_d2t(tmp_path: Path) -> None:
    make_drafter(tmp_path / "first", BASE, draft_vocab=DRAFT, base_name="name/base")
    assert convert(tmp_path / "first", tmp_path / "out", "speculators") == 0
    first = load_file(tmp_path / "first" / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["t2d"], first["t2d"])


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("safeailab", {"norm_before_residual": True}, "cannot say norm_before_residual; the speculators format can"),
    ("safeailab", {"norm_before_fc": True}, "cannot say norm_before_fc"),
    ("safeailab", {"fc_norm": True, "norm_output": True}, "cannot say fc_norm, nor norm_output"),
    ("safeailab", {"qk_norm": True}, "cannot say qk_norm"),
    ("safeailab", {"layer_ids": (1, 2, 3)}, "cannot say that the drafter reads layers (1, 2, 3)"),
    ("safeailab", {"head_dim": 16}, "cannot say that 4 heads have 16 dimensions each"),
    ("safeailab", LLAMA3, "cannot say rotary scaling llama3"),
    (
        "safeailab",
        {"rope_theta": 5e5, "rope_scaling": LinearScaling(2.0)},
        "rotary scaling with a base of 500000",
    ),
    ("specforge", {"norm_before_residual": True}, "cannot say norm_before_residual"),
    ("specforge", {"norm_before_fc": True}, "cannot say norm_before_fc"),
    ("specforge", {"qk_norm": True}, "cannot say qk_norm"),
    ("specforge", {"layer_ids": (0, 2, 3)}, "cannot say that the drafter reads layers (0, 2, 3)"),
]


@pytest.mark.parametrize(("form", "changes", "message"), REFUSED)
def test_what_a_format_cannot_say_is_refused(
    tmp_path: Path, capsys: Capture, form: str, changes: dict[str, Any], message: str
) -> None:
    make_drafter(tmp_path / "first", BASE, format="speculators", base_name="name/base", **changes)
    assert convert(tmp_path / "first", tmp_path / "out", form) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_calls_are_refused(tmp_path: Path, capsys: Capture) -> None:
    weights = make_drafter(tmp_path / "first", BASE)
    for form, more, message in (
        ("speculators", [], "names the base model, and this drafter names none; give --base"),
        ("vllm", [], "holds an EAGLE-3 drafter; its formats are safeailab, specforge, speculators"),
        ("specforge", ["--expand"], "--expand is for Medusa heads"),
    ):
        assert convert(tmp_path / "first", tmp_path / "out", form, *more) == 2
        assert message in capsys.readouterr().err
    assert convert(Path("builtin"), tmp_path / "out", "speculators") == 2
    assert "holds Medusa heads; their formats are" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="unknown format 'gguf'"):
        write_drafter(weights, tmp_path / "out", "gguf", base=None)
    assert EAGLE3_FORMATS == FORMATS


# beside a base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_model(num_hidden_layers=8).save_pretrained(folder)
    return folder


def test_the_default_layers_need_no_name_beside_their_base(tmp_path: Path, base: Path) -> None:
    config = read_config(base)
    weights = make_drafter(tmp_path / "first", config, layer_ids=(2, 4, 5), base_name=str(base))
    assert convert(tmp_path / "first", tmp_path / "out", "safeailab") == 0
    assert LAYER_IDS not in json.loads((tmp_path / "out" / "config.json").read_text())
    found = read_drafter(tmp_path / "out", config)
    assert found.config.feature_layers(8) == weights.config.feature_layers(8)
    assert convert(tmp_path / "first", tmp_path / "spec", "speculators", "--base", str(base)) == 0
    verifier = json.loads((tmp_path / "spec" / "config.json").read_text())["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": str(base), "architectures": ["LlamaForCausalLM"]}


def test_inspect_says_what_a_drafter_is(tmp_path: Path, base: Path, capsys: Capture) -> None:
    config = read_config(base)
    make_drafter(
        tmp_path, config, draft_vocab=9, format="speculators", fc_norm=True, layer_ids=(1, 2, 3), base_name=str(base)
    )
    assert main(["inspect", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "kind EAGLE-3 drafter",
        "format speculators",
        "hidden size 32, the base's 32",
        "reads what goes into layers 1, 2, 3",
        "attention 4 heads of 8, 2 of keys and values",
        "vocabulary 16",
        "tokens 9 (d2t)",
        "rotary base 10000",
        "norms fc_norm",
        "embedding the base's",
        "parameters 13,",
        "K/V of a token 64 bytes",
        "dtype float32",
        f"base model {base}",
    ):
        assert words in out, words


def test_inspect_compares_with_the_base(tmp_path: Path, base: Path, capsys: Capture) -> None:
    config = read_config(base)
    own = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    for folder, embedding, words in (
        ("copy", own, "a copy of the base's"),
        ("other", own + 1, "its own, other than the base's"),
    ):
        make_drafter(tmp_path / folder, config, embedding=embedding, base_name=str(base))
        assert main(["inspect", str(tmp_path / folder)]) == 0
        assert words in capsys.readouterr().out


def test_inspect_names_problems(tmp_path: Path, base: Path, capsys: Capture) -> None:
    weights = make_drafter(tmp_path / "first", BASE)
    for more, message in (
        ([], "config.json names no base model; serve with --heads beside the base"),
        (["--base", str(base)], "does not fit the base model: "),
        (["--base", "nowhere"], "neither a folder nor a hub id; give --base"),
    ):
        assert main(["inspect", str(tmp_path / "first"), *more]) == 1
        assert message in capsys.readouterr().out
    weights.tensors["fc.weight"].zero_()
    write_drafter(weights, tmp_path / "zero", "safeailab", base="name/base")
    assert main(["inspect", str(tmp_path / "zero")]) == 1
    assert "fc.weight is all zero: this drafter is untrained" in capsys.readouterr().out
    (tmp_path / "first" / "config.json").write_text("{}")
    assert main(["inspect", str(tmp_path / "first")]) == 1
    assert "hidden_size must be a positive integer" in capsys.readouterr().out
