"""A small model inside a large one: what is checked is that nobody can tell by the text."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from manyheads import LLM, SamplingParams
from manyheads.checkpoint import BUILTIN_FOLDER, tensor_files
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.models.llama import Llama
from manyheads.models.loader import load_model
from manyheads.models.registry import read_config
from manyheads.speculation.medusa.checkpoint import read_heads
from manyheads.speculation.medusa.heads import MedusaHeads
from tests.forward import hidden_states

torch.set_num_threads(1)

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "enlarge.py"
CPU = torch.device("cpu")
LAYERS = 9
QUESTIONS = [
    "Write a short story about a dog who finds a ball.",
    "What is the capital of France, and what is it known for?",
    "Tom has 3 apples and buys 5 more. How many apples does he have?",
    "Translate to German: The house is small.",
]


def load_script() -> Any:
    """benchmarks/ is a folder of scripts, not a package."""
    spec = importlib.util.spec_from_file_location("enlarge", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["enlarge"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


enlarge = load_script()

SHAPES = {
    # one copy, its norm weights rounded; every query head has a K/V head of its own
    "512": ({"hidden_size": 512, "intermediate_size": 1280, "num_heads": 4, "num_kv_heads": 4}, torch.float32),
    # three copies, nothing rounded; the small model's three query heads sit at two K/V heads
    "1152": ({"hidden_size": 1152, "intermediate_size": 1024, "num_heads": 4, "num_kv_heads": 2}, torch.float16),
}


@dataclass(frozen=True)
class Large:
    folder: Path
    enlarger: Any


@pytest.fixture(scope="module", params=list(SHAPES))
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Large:
    sizes, dtype = SHAPES[request.param]
    shape = enlarge.Shape(num_layers=LAYERS, vocab_size=4500, max_position_embeddings=4096, **sizes)
    enlarger = enlarge.Enlarger(BUILTIN_FOLDER, shape, dtype, CPU)
    folder = tmp_path_factory.mktemp("large") / request.param
    enlarge.write(folder, enlarger)
    return Large(folder, enlarger)


def load(folder: Path) -> tuple[Llama, MedusaHeads]:
    config = read_config(folder)
    model = load_model(folder, config, torch.float32, CPU)
    return model, MedusaHeads(read_heads(folder / "heads", config), model, torch.float32, CPU)


@torch.inference_mode()
def test_hidden_states_logits_and_candidates(large: Large) -> None:
    tokens = torch.tensor(Tokenizer.load(BUILTIN_FOLDER).encode(" ".join(QUESTIONS)))
    (small_model, small_heads), (model, heads) = load(BUILTIN_FOLDER), load(large.folder)
    wanted, hidden = hidden_states(small_model, tokens), hidden_states(model, tokens)
    copies, size = large.enlarger.copies, wanted.shape[1]
    for j, (amplitude, gain) in enumerate(zip(copies.amplitudes, copies.gains, strict=True)):
        factor = amplitude * gain / copies.ratio_squared**0.5
        torch.testing.assert_close(hidden[:, j * size : (j + 1) * size], wanted * factor, rtol=1e-4, atol=1e-4)
    assert not hidden[:, len(copies.gains) * size :].any()
    logits = model.logits(hidden)
    torch.testing.assert_close(logits[:, :4096], small_model.logits(wanted), rtol=1e-4, atol=1e-3)
    assert int(logits.argmax(dim=-1).max()) < 4096
    # float32 sums in another order may turn near ties
    same = heads.candidates(hidden, 10)[0] == small_heads.candidates(wanted, 10)[0]
    assert same[:, :, 0].all()
    assert same.float().mean() > 0.995


def replies(llm: LLM) -> tuple[list[list[int]], int]:
    """Greedy replies to all questions, and the steps they took in all."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    outputs = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=16))
    return [list(o.outputs[0].token_ids) for o in outputs], sum(o.outputs[0].num_steps for o in outputs)


def make(model: str, speculative: bool) -> LLM:
    return LLM(model, speculative=speculative, tree_size=8 if speculative else None, num_blocks=64, num_threads=1)


@pytest.fixture(scope="module")
def wanted() -> tuple[list[list[int]], int]:
    """What the small model replies, and in how many speculating steps."""
    return replies(make("builtin", True))


@pytest.mark.parametrize("speculative", [False, True])
def test_greedy_text(large: Large, wanted: tuple[list[list[int]], int], speculative: bool) -> None:
    texts, steps = wanted
    got, large_steps = replies(make(str(large.folder), speculative))
    assert got == texts
    if speculative:
        assert abs(large_steps - steps) <= 1
        assert steps < 0.9 * sum(map(len, texts))
    else:
        assert large_steps >= sum(map(len, texts))


def test_only_what_must_be_zero_is(large: Large) -> None:
    """Unused numbers are random where they can be; the hidden state is written by nothing but the small model."""
    enlarger = large.enlarger
    used = len(enlarger.copies.gains) * 384
    for key, tensor in enlarger.tensors():
        if key.endswith(("o_proj.weight", "down_proj.weight")):
            assert not tensor[used:].any()
            layer = int(key.split(".")[2])
            assert bool(tensor[:used].any()) is (layer < 8)
        elif key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "lm_head.weight")):
            assert (tensor == 0).float().mean() < 0.01
    index = json.loads((large.folder / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == LAYERS * 9 + 3
    assert len(tensor_files(large.folder)) == len(set(index["weight_map"].values()))


@pytest.mark.parametrize(
    ("hidden", "exact"), [(384, True), (512, False), (1536, True), (2048, True), (4096, True), (8192, True)]
)
def test_copies(hidden: int, exact: bool) -> None:
    copies = enlarge.find_copies(384, hidden)
    assert copies.exact is exact
    assert sum(a * a for a in copies.amplitudes) * 384 / hidden == pytest.approx(copies.ratio_squared)
    total = sum(a * g for a, g in zip(copies.amplitudes, copies.gains, strict=True))
    assert total == pytest.approx(copies.ratio_squared**0.5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 2, "num_kv_heads": 2}, "num_kv_heads must be at least 3, not 2"),
        ({"num_heads": 6}, "num_heads must divide the hidden size, and be a multiple of num_kv_heads"),
        ({"vocab_size": 4000}, "vocab_size must be at least 4096, not 4000"),
        ({"num_layers": 7}, "num_layers must be at least 8, not 7"),
        ({"hidden_size": 256}, "a hidden size of 384 does not fit into 256"),
    ],
)
def test_shapes_that_are_too_small(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        enlarge.Enlarger(BUILTIN_FOLDER, enlarge.Shape(**sizes), torch.float16, CPU)


def test_a_folder_that_is_in_use(large: Large) -> None:
    with pytest.raises(FileExistsError, match="is not empty"):
        enlarge.write(large.folder, large.enlarger)
