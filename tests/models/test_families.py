from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from manyheads.batch import TreeTensors
from manyheads.config import ConfigError
from manyheads.models.linear import Split
from manyheads.models.llama import AttentionLayer, Llama
from manyheads.models.loader import load_model
from manyheads.models.parameters import Packed
from manyheads.models.registry import FAMILIES, parameters, read_config
from tests.forward import hidden_states, logits
from tests.models.families import LLAMA3, MODELS, SHAPE, reference

torch.set_num_threads(1)

CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Llama:
    return load_model(folder, read_config(folder), dtype, CPU)


TOKENS = torch.randint(0, 61, (40,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    model = reference(name)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        wanted = model(TOKENS[None]).logits[0]
    assert float(wanted.std()) > 0.5  # not all alike, so that the tolerance means something
    torch.testing.assert_close(logits(load(tmp_path), TOKENS), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_that_nobody_reads_go_no_further_than_the_last_attention(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference(name).save_pretrained(tmp_path)
    model = load(tmp_path)
    every, read, passed = hidden_states(model, TOKENS), torch.tensor([3, 39]), list[int]()
    feed_forward, is_finite = model.feed_forward, torch.zeros(len(TOKENS) - 1, dtype=torch.bool)

    def watched(layer: AttentionLayer, x: Any, residual: Tensor) -> Any:
        passed.append(len(x))
        return feed_forward(layer, x, residual)

    monkeypatch.setattr(model, "feed_forward", watched)
    found = hidden_states(model, TOKENS, read=read, is_finite=is_finite)
    assert passed == [len(TOKENS)] * (len(model.layers) - 1) + [2]
    torch.testing.assert_close(found, every[read], atol=1e-5, rtol=1e-5)
    assert is_finite.all()


@pytest.mark.parametrize("before", [2, 0])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_token_without_numbers_is_told(tmp_path: Path, before: int, poison: float) -> None:
    """Nobody reads its hidden states, and those before it have numbers (behind it, kernels differ)."""
    reference("qwen3").save_pretrained(tmp_path)
    model = load(tmp_path)
    model.embedding[60, 3] = poison
    tokens = torch.tensor([1, 2, 60, 3, 4, 5] if before else [60])
    is_finite = torch.ones(before + 1, dtype=torch.bool)
    hidden_states(model, tokens, read=torch.tensor([0]), is_finite=is_finite)
    assert is_finite.tolist() == [True] * before + [False]


@pytest.mark.parametrize("name", MODELS)
def test_what_a_family_declares_is_what_transformers_keeps(tmp_path: Path, name: str) -> None:
    model = reference(name)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    kept = {key.removeprefix("model."): tuple(value.shape) for key, value in saved.items()}
    assert parameters(read_config(tmp_path)).shapes == kept


def test_every_family_is_tested() -> None:
    assert {model_type for model_type, _ in MODELS.values()} == {family.model_type for family in FAMILIES.values()}


def test_projections_of_the_same_input_cannot_split_it() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.: projections"):
        Packed("layers.0.", {"q_proj": 4, "k_proj": 2}, 8, split=Split.INPUTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_in_half_precision_run_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    reference("llama with biases").to(dtype).save_pretrained(tmp_path)
    with torch.inference_mode():
        wanted = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(TOKENS[None]).logits[0]
    assert read_config(tmp_path).dtype == dtype
    torch.testing.assert_close(logits(load(tmp_path), TOKENS), wanted, atol=1e-4, rtol=1e-4)


def test_a_model_runs_in_bfloat16(tmp_path: Path) -> None:
    model = reference("qwen3")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    found = logits(loaded, TOKENS)
    assert found.dtype == torch.float32
    with torch.inference_mode():
        wanted = model(TOKENS[None]).logits[0]
    assert float(F.cosine_similarity(found, wanted).min()) > 0.98


@pytest.mark.parametrize("name", ["glm4", "phi3 tied, turned in part", "gemma2", "mixtral"])
def test_weights_in_8_bits(tmp_path: Path, name: str) -> None:
    """Those of heads that are read in another order too, and of experts."""
    model = reference(name)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, read_config(tmp_path), torch.float32, CPU, quantization="int8")
    with torch.inference_mode():
        wanted = model(TOKENS[None]).logits[0]
    found = logits(loaded, TOKENS)
    assert not torch.equal(found, wanted)
    assert float(F.cosine_similarity(found, wanted).mean()) > 0.98


def test_positions_count_and_not_places_in_the_batch(tmp_path: Path) -> None:
    """Four tokens in another order, with their positions and a tree that follows them."""
    reference("llama").save_pretrained(tmp_path)
    model = load(tmp_path)
    order = [2, 0, 3, 1]
    above = [[order.index(position) for position in range(own + 1)] for own in order]
    tree = TreeTensors(
        parent=torch.tensor([nodes[-2:][0] for nodes in above]),
        depth=torch.tensor(order),
        column=torch.arange(4),
        bits=torch.tensor([sum(1 << node for node in nodes) for nodes in above]),
        path=torch.tensor([nodes + nodes[-1:] * (4 - len(nodes)) for nodes in above]),
    )
    found = logits(model, TOKENS[order], tree)
    torch.testing.assert_close(found, logits(model, TOKENS[:4])[order], atol=1e-5, rtol=1e-5)


def test_memory_is_that_of_the_weights(tmp_path: Path) -> None:
    model = reference("qwen2")
    model.save_pretrained(tmp_path)
    assert load(tmp_path).memory_bytes() == sum(p.numel() * 4 for p in model.parameters())


def edit(folder: Path, **values: Any) -> Path:
    """config.json with some keys changed; None takes a key away."""
    path = folder / "config.json"
    raw = (json.loads(path.read_text()) if path.exists() else {}) | values
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return edit(tmp_path, architectures=["LlamaForCausalLM"], **SHAPE)


def test_rope_is_understood_as_transformers_4_spelled_it(tmp_path: Path) -> None:
    model = reference("llama3 rope")
    model.save_pretrained(tmp_path)
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    edit(tmp_path, rope_parameters=None, rope_scaling=scaling, rope_theta=100.0)
    with torch.inference_mode():
        wanted = model(TOKENS[None]).logits[0]
    torch.testing.assert_close(logits(load(tmp_path), TOKENS), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "windows"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 40}, (40, 40)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 400}, (None, None)),
        ({"architectures": ["MistralForCausalLM"]}, (None, None)),
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 400}, (None, None)),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 40}, (None, None)),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 40, "use_sliding_window": False}, (None, None)),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 40,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            (None, 40),
        ),
    ],
)
def test_windows_are_those_of_layers(llama: Path, values: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    config = read_config(edit(llama, **values))
    assert config.windows == windows
    assert config.max_position_embeddings == 128


def test_the_generation_config_says_where_texts_end(llama: Path) -> None:
    assert read_config(llama).eos_token_ids == ()
    assert read_config(edit(llama, eos_token_id=2)).eos_token_ids == (2,)
    (llama / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert read_config(llama).eos_token_ids == (3, 4)
    (llama / "generation_config.json").write_text("{}")
    assert read_config(llama).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported.*LlamaForCausalLM"),
        ({"architectures": None}, "architecture . is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, not True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"hidden_size": "32"}, "hidden_size must be"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope scaling 'su'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"torch_dtype": "no_such_type"}, "dtype 'no_such_type'"),
    ],
)
def test_configs_that_are_not_understood_are_refused(llama: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(edit(llama, **values))
    assert str(llama / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "no valid JSON"), ("[]", "no JSON object"), ("\udcff", "no valid")]
)
def test_a_broken_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match=f"config.json .*{message}"):
        read_config(tmp_path)
