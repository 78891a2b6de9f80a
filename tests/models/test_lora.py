"""Adapters as they are read, and what a model makes of them: the sums that peft merges into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manyheads.config import CheckpointError, ConfigError
from manyheads.models.adapters import attach, count_numbers
from manyheads.models.linear import Linear, Split
from manyheads.models.llama import Llama
from manyheads.models.loader import load_model
from manyheads.models.lora import read_adapters
from manyheads.models.registry import read_config
from manyheads.ops.adapters import LowRank
from manyheads.ops.products import PlainProduct
from manyheads.ops.torch import TorchOps
from manyheads.quantization.base import CodedScheme
from manyheads.quantization.int8 import INT8
from tests.forward import hidden_states, logits
from tests.lora import change_config, merged, save_adapter
from tests.models.families import reference
from tests.tiny import make_model, model_config

torch.set_num_threads(1)
TOKENS = torch.randint(0, 61, (24,), generator=torch.Generator().manual_seed(5))
CPU = torch.device("cpu")
FAMILIES = ("llama with biases", "phi3", "glm4", "cohere2", "olmo2", "starcoder2", "gemma2", "granite", "mixtral")
"""With weights in one module or several, outputs in another order, norms behind products, experts."""


def adapted(folder: Path, *adapters: Path) -> Llama:
    config = read_config(folder)
    model = load_model(folder, config, torch.float32, CPU)
    before = model.memory_bytes()
    read = read_adapters({path.name: str(path) for path in adapters}, config)
    numbers = count_numbers(read, config)
    attach(model, read)
    assert model.memory_bytes() - before == 4 * numbers > 0
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapters_sums_are_those_of_merged_weights(tmp_path: Path, family: str) -> None:
    """Of two adapters of other ranks and other modules, each; and none where no adapter is asked for."""
    base = reference(family)
    base.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "a", base)
    save_adapter(tmp_path / "b", base, ("o_proj",), rank=3, seed=1)
    model = adapted(tmp_path / "base", tmp_path / "a", tmp_path / "b")
    assert model.adapters is not None
    for adapter, oracle in enumerate((base, merged(base, tmp_path / "a"), merged(base, tmp_path / "b"))):
        with torch.inference_mode():
            wanted = oracle(TOKENS[None]).logits[0]
        model.adapters.plan(torch.full((len(TOKENS),), adapter))
        torch.testing.assert_close(logits(model, TOKENS), wanted, atol=3e-4, rtol=1e-3)
    model.adapters.plan(torch.arange(len(TOKENS)) % 3)
    every = hidden_states(model, TOKENS)
    model.adapters.plan(torch.arange(len(TOKENS)) % 3)
    read = torch.tensor([1, 2, 9, 20])
    torch.testing.assert_close(hidden_states(model, TOKENS, read=read), every[read], atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        assert float((wanted - base(TOKENS[None]).logits[0]).abs().max()) > 0.1, "the adapter does nothing"


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"ranks": {"q_proj": 7}, "rank_pattern": {"q_proj": 7}},
        {"alpha_pattern": {"v_proj": 32, "down_proj": 1}},
        {
            "lora_dropout": 0.1,
            "inference_mode": True,
            "peft_version": "0.21.2",
            "use_dora": False,
            "megatron_core": "m",
        },
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_changes_the_sums_is_read(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = make_model(vocab_size=61)
    base.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "a", base, **settings)
    model = adapted(tmp_path / "base", tmp_path / "a")
    assert model.adapters is not None
    model.adapters.plan(torch.ones(len(TOKENS), dtype=torch.int64))
    with torch.inference_mode():
        wanted = merged(base, tmp_path / "a")(TOKENS[None]).logits[0]
    torch.testing.assert_close(logits(model, TOKENS), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; it must be 'LORA'"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication=.* is not supported"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices=.* is not supported"),
        ({"something_new": 3}, "something_new=3 is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not supported"),
        ({"r": 0}, "r must be a whole number above 0, not 0"),
        ({"r": 2.5}, "r must be a whole number above 0, not 2.5"),
        ({"lora_alpha": None}, "lora_alpha must be a number above 0, not None"),
        ({"alpha_pattern": {"q_proj": "8"}}, r"alpha_pattern\['q_proj'\] must be a number above 0"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: '\\(' is no regular expression"),
        ({"rank_pattern": [3]}, r"rank_pattern=\[3\] is not supported; it must be numbers by module"),
        ({"use_rslora": "yes"}, "use_rslora='yes' is not supported"),
    ],
)
def test_keys_that_are_not_supported_are_named(tmp_path: Path, changes: dict[str, Any], error: str) -> None:
    save_adapter(tmp_path / "a", make_model())
    change_config(tmp_path / "a", **changes)
    with pytest.raises(ConfigError, match=f"adapter_config.json: {error}"):
        read_adapters({"a": str(tmp_path / "a")}, model_config())


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("key", "tensor", "error"),
    [
        (
            f"{Q}.lora_A.weight",
            torch.zeros(5, 32),
            r"has shape \(5, 32\), not \(4, 32\) \(r=4, and the base's .* 32 × 32",
        ),
        (f"{Q}.lora_B.weight", torch.zeros(48, 4), r"has shape \(48, 4\), not \(32, 4\)"),
        (f"{Q}.lora_A.weight", torch.full((4, 32), torch.nan), "holds values that are not finite"),
        (f"{Q}.lora_magnitude_vector", torch.zeros(32), "is no lora_A or lora_B weight"),
        ("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 32), "adapters may add to .*, not to lm_head"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 16), "is no lora_A or lora_B weight"),
        (Q.replace("q_proj", "w_proj") + ".lora_A.weight", torch.zeros(4, 32), r"not to layers\.0\.self_attn\.w_proj"),
        (Q.replace("layers.0", "layers.7") + ".lora_A.weight", torch.zeros(4, 32), "not to layers.7.self_attn.q_proj"),
        (Q.replace("model.model.model", "model") + ".lora_A.weight", torch.zeros(4, 32), "is no lora_A or lora_B"),
        (f"{Q}.lora_B.weight", None, r"layers\.0\.self_attn\.q_proj has no lora_B"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, key: str, tensor: torch.Tensor | None, error: str) -> None:
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "a", base)
    file = tmp_path / "a" / "adapter_model.safetensors"
    state = load_file(file) | ({key: tensor} if tensor is not None else {})
    if tensor is None:
        del state[key]
    save_file(state, file)
    with pytest.raises(CheckpointError, match=error):
        read_adapters({"a": str(tmp_path / "a")}, read_config(tmp_path / "base"))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    config = read_config(tmp_path / "base")
    with pytest.raises(ConfigError, match="lora a: '/nowhere' is no folder"):
        read_adapters({"a": "/nowhere"}, config)
    with pytest.raises(ConfigError, match=r"lora a: .* holds no adapter_config\.json, as peft writes it"):
        read_adapters({"a": str(tmp_path / "base")}, config)
    save_adapter(tmp_path / "b", base, ("q_proj",))
    change_config(tmp_path / "b", target_modules=["q_proj", "w_proj"])
    with pytest.raises(CheckpointError, match="target_modules names 'w_proj', which there are no weights for"):
        read_adapters({"b": str(tmp_path / "b")}, config)
    save_adapter(tmp_path / "c", base, ("none",))
    with pytest.raises(CheckpointError, match="c holds no lora_A and lora_B weights"):
        read_adapters({"c": str(tmp_path / "c")}, config)


class Quantized(PlainProduct):
    """Takes rows in 8 bits, and leaves its result in parts."""

    def takes(self, x: torch.Tensor) -> CodedScheme:
        return INT8

    def parts(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self(x) / 2] * 2)


def test_adapters_read_rows_as_they_are_and_add_to_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    ops, x = TorchOps(), torch.randn(3, 8)
    monkeypatch.setattr(ops, "product", lambda weight, bias, dtype: Quantized(weight, bias))
    weight, weights = torch.randn(6, 8), LowRank(torch.randn(1, 8, 2), torch.randn(12), (6,))
    linear = Linear(weight, None, torch.float32, ops, Split.INPUTS)
    assert linear.takes(x) is INT8
    adapters = ops.adapters(1)
    linear.adapt(weights, adapters)
    assert linear.takes(x) is None
    adapters.plan(torch.tensor([1, 0, 1]))
    added = (x @ weights.a[0] @ weights.parts[0][0]) * torch.tensor([[1.0], [0.0], [1.0]])
    assert linear(x).shape == (2, 3, 6)
    torch.testing.assert_close(linear(x).sum(0), x @ weight.T + added)


def test_experts_take_no_adapters(tmp_path: Path) -> None:
    base = reference("mixtral")
    base.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "a", base)
    file = tmp_path / "a" / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1.lora_A.weight"
    save_file(load_file(file) | {key: torch.zeros(4, 32)}, file)
    with pytest.raises(CheckpointError, match=r"not to layers\.0\.block_sparse_moe\.experts\.0\.w1"):
        read_adapters({"a": str(tmp_path / "a")}, read_config(tmp_path / "base"))
