"""Models in GGUF files compute what transformers makes of the same files, or of what they were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from manyheads.checkpoint import described, resolve
from manyheads.models.loader import load_model
from manyheads.models.registry import read_config
from manyheads.quantization.base import QuantizedWeight
from manyheads.quantization.blocks import BlockWeight
from manyheads.quantization.int4 import Int4Weight
from tests.forward import logits
from tests.gguf.write import VOCAB, tiny, write
from tests.models.families import LLAMA3

torch.set_num_threads(1)

TOKENS = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(5))
SIX_LAYERS = {"num_hidden_layers": 6, "layer_types": None, "sliding_window": 5}
THETAS = {"rope.freq_base": 500.0}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama tied": ("llama tied", {}, {}),
    "llama of another base": ("llama of another base", {}, THETAS),
    "llama with wide heads": ("llama with wide heads", {}, {}),
    "llama with biases": ("llama with biases", {}, {}),
    "linear rope": ("linear rope", {}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "yarn rope": (
        "yarn rope",
        {},
        {
            "rope.freq_base": 100.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        },
    ),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "phi3": ("phi3", {}, {"attention.sliding_window": 9}),
    "phi3 turned in part": ("phi3 tied, turned in part", {"hidden_size": 64}, {"rope.dimension_count": 12}),
    "starcoder2": ("starcoder2", {"sliding_window": None}, {}),
    "gemma2": (
        "gemma2",
        {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
        {"attention.sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        "gemma3",
        {
            "query_pre_attn_scalar": 8,
            **SIX_LAYERS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        },
        {
            "attention.sliding_window": 5,
            "rope.freq_base": 500.0,
            "rope.freq_base_swa": 10.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 4.0,
        },
    ),
}  # fmt: skip


def ours(path: Path, **settings: Any) -> Tensor:
    folder = resolve(str(path))
    model = load_model(folder, read_config(folder), torch.float32, torch.device("cpu"), **settings)
    return logits(model, TOKENS)


def theirs(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(TOKENS[None]).logits[0]
    assert float(found.std()) > 0.3  # not all alike, so that the tolerance means something
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_what_it_was_written_from(tmp_path: Path, name: str) -> None:
    of, changes, keys = CASES[name]
    model = tiny(of, **changes)
    path = write(tmp_path / "model.gguf", model, more=keys)
    torch.testing.assert_close(ours(path), theirs(model), atol=1e-4, rtol=1e-4)


KINDS = [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]


@pytest.mark.parametrize("kind", [*KINDS, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K], ids=lambda kind: kind.name)
def test_every_type_is_what_transformers_reads(tmp_path: Path, kind: Kind) -> None:
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "token_embd"]
    kinds = dict.fromkeys(names if kind in KINDS else ["ffn_down"], kind)
    path = write(tmp_path / "model.gguf", tiny("llama"), kinds)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(ours(path), theirs(model), atol=1e-4, rtol=1e-4)


def loaded(path: Path) -> list[Any]:
    """The weights that products are made of."""
    folder, made = resolve(str(path)), list[Any]()
    load_model(folder, read_config(folder), torch.float32, torch.device("cpu"), ops=Recorder(made))
    return made


def test_matrices_stay_as_they_are_where_all_of_a_product_come_alike(tmp_path: Path) -> None:
    kinds = dict.fromkeys(["attn_q", "attn_k", "attn_v", "ffn_gate", "output"], Kind.Q4_0)
    path = write(tmp_path / "model.gguf", tiny("llama"), kinds | {"ffn_up": Kind.Q8_0, "ffn_down": Kind.Q4_K})
    made = [(type(weight), tuple(weight.shape)) for weight in loaded(path)]
    layer = [(Int4Weight, (64, 32)), (Tensor, (32, 32)), (Tensor, (512, 32)), (BlockWeight, (32, 256))]
    assert made == [*layer, *layer, (Int4Weight, (VOCAB, 32))]
    folder = resolve(str(path))
    kept, wide = "2 in Q4_K, 7 in Q4_0", "3 in F32, 2 in Q4_0, 2 in Q8_0 are widened to float32"
    line = described(folder, torch.float32, is_rounded=False, in_blocks=True)
    assert line == f"matrices of model.gguf: {', '.join(reversed(kept.split(', ')))} stay as they are; {wide}"
    line = described(folder, torch.float16, is_rounded=False, in_blocks=False)
    assert line is not None
    assert "7 in Q4_0 stay as they are; 3 in F32, 2 in Q4_0, 2 in Q4_K, 2 in Q8_0 are widened to float16" in line
    line = described(folder, torch.float32, is_rounded=True, in_blocks=True)
    assert line is not None
    assert line.endswith("9 in Q4_0, 2 in Q4_K, 2 in Q8_0 are widened to float32 and rounded anew")


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q8_0], ids=lambda kind: kind.name)
def test_blocks_are_the_same_numbers(tmp_path: Path, kind: Kind) -> None:
    path = write(tmp_path / "model.gguf", tiny("llama"), {"ffn_down": kind})
    (first, _) = [weight for weight in loaded(path) if isinstance(weight, QuantizedWeight)]
    blocks = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.0.ffn_down.weight")
    assert torch.equal(first.dequantize(torch.float32), torch.from_numpy(gguf.dequantize(blocks.data, kind)))


def test_an_embedding_that_is_the_projection_is_multiplied_in_blocks(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", tiny("llama tied"), {"token_embd": Kind.Q8_0})
    assert isinstance(loaded(path)[-1], BlockWeight)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(ours(path), theirs(model), atol=1e-4, rtol=1e-4)


def test_where_blocks_are_not_multiplied_the_embedding_is_not_there_twice(tmp_path: Path) -> None:
    folder = resolve(str(write(tmp_path / "model.gguf", tiny("llama tied"), {"token_embd": Kind.Q8_0})))
    model = load_model(folder, read_config(folder), torch.bfloat16, torch.device("cpu"))
    assert model.lm_head.product.plain is model.embedding


def test_factors_of_frequencies_are_those_of_llama_3(tmp_path: Path) -> None:
    """llama.cpp keeps Llama 3.1's scaling as a tensor, which transformers does not read: the model itself says."""
    model = tiny("llama3 rope", rope_parameters=LLAMA3)
    plain = 1 / 100.0 ** (torch.arange(0, 8, 2) / 8)
    factors = plain / model.model.rotary_emb.inv_freq
    assert factors.tolist() != [1.0] * 4
    path = write(tmp_path / "model.gguf", model, more={"rope.freq_base": 100.0}, extra={"rope_freqs.weight": factors})
    torch.testing.assert_close(ours(path), theirs(model), atol=1e-4, rtol=1e-4)


def test_phi_3_has_factors_for_short_and_long_texts(tmp_path: Path) -> None:
    model = tiny("phi3 stretched")
    rope = model.config.rope_parameters
    long = {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]) for kind in ("short", "long")}
    more = {
        "rope.freq_base": 100.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": float(model.model.rotary_emb.attention_scaling),
    }
    path = write(tmp_path / "model.gguf", model, more=more, extra=long)
    torch.testing.assert_close(ours(path), theirs(model), atol=1e-4, rtol=1e-4)


def test_a_widened_model_can_be_rounded(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", tiny("llama"), {"ffn_down": Kind.Q8_0})
    plain, rounded = ours(path), ours(path, quantization="int8")
    assert not torch.equal(plain, rounded)
    torch.testing.assert_close(plain, rounded, atol=0.5, rtol=0.1)


class Recorder:
    """The operations of a CPU, and the weights that products were asked for."""

    def __init__(self, made: list[Any]) -> None:
        from manyheads.ops import ops_for

        self._ops, self._made = ops_for(torch.device("cpu")), made

    def product(self, weight: Any, bias: Tensor | None, dtype: torch.dtype) -> Any:
        self._made.append(weight)
        return self._ops.product(weight, bias, dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)
