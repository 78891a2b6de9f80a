"""A model without a file of weights is loaded and served, with heads whose candidates are accepted by chance."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manyheads.models import loader
from manyheads.models.loader import load_model
from manyheads.models.registry import read_config
from manyheads.models.size import weights_bytes
from manyheads.request import EngineRequest, SamplingParams
from manyheads.speculation.medusa import drafter
from tests.benchmarks.test_by_chance import restored as restored
from tests.benchmarks.test_by_chance import sampled
from tests.engine.test_exactness import engine
from tests.engine.test_ranks import engine as ranked_engine

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import by_chance
import random_model
from changes import Changes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16, "head_dim": 16,
         "num_experts": 8, "num_local_experts": 8, "intermediate_size": 64, "moe_intermediate_size": 32}  # fmt: skip


def small(folder: Path, shape: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a tiny model that is built as a large one; what `install` replaces is put back in the end."""
    for owner, name in ((loader, "tensor_files"), (loader, "read_tensors"), (drafter, "read_heads")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    full = random_model.SHAPES[shape]
    monkeypatch.setitem(random_model.SHAPES, shape, full | {key: SMALL[key] for key in full.keys() & SMALL.keys()})
    random_model.write(folder, shape)
    return folder


@pytest.mark.parametrize("shape", random_model.SHAPES)
@pytest.mark.usefixtures("restored")
def test_a_shape_is_served(tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model.install(small(tmp_path, shape, monkeypatch))
    weights = load_model(tmp_path, read_config(tmp_path), torch.float32, CPU)
    assert 0.8 < float(weights.embedding.std()) / random_model.DEVIATION < 1.2
    by_chance.ByChance(by_chance.table_of("medusa")).install()
    served = engine(tmp_path, 8, heads=str(tmp_path / "heads"), num_blocks=100)
    assert served.ready.drafter == "medusa"
    for i in range(4):
        params = SamplingParams(temperature=1.0, seed=i, max_tokens=40, ignore_eos=True)
        served.add_request(EngineRequest(request_id=str(i), prompt_token_ids=[i, 3, 5], params=params))
    tokens = [
        token for _ in range(400) if served.has_work() for delta in served.step() for token in delta.new_token_ids
    ]
    assert len(tokens) == 160
    assert len(set(tokens)) > 40
    assert served.stats().accepted_tokens > 0


@pytest.mark.parametrize("quantization", [None, "fp8", "int4"])
@pytest.mark.usefixtures("restored")
def test_two_ranks_give_the_text_of_one(
    tmp_path: Path, quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is a process, which makes the same weights and keeps its part."""
    folder = small(tmp_path, "llama-3.1-70b", monkeypatch)
    Changes(by_chance=True, random_folder=str(folder)).install()
    settings = {"heads": str(folder / "heads"), "quantization": quantization, "num_blocks": 200}
    shared, alone = ranked_engine(folder, 2, **settings), ranked_engine(folder, 1, **settings)
    assert shared.runner.model.embedding.shape[0] * 2 == SMALL["vocab_size"]
    assert sampled(shared) == sampled(alone)
    assert shared.stats().accepted_tokens > 0


def test_weights_are_the_same_every_time_and_share_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that is kept as it came would otherwise hold what was rounded, in full."""
    config = read_config(small(tmp_path, "llama-3.1-70b", monkeypatch))
    first, second = dict(random_model.tensors(config)), dict(random_model.tensors(config))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["layers.0.mlp.up_proj.weight"], first["layers.1.mlp.up_proj.weight"])
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in first.values())
    heads, again = random_model.heads(config), random_model.heads(config)
    assert heads.projections is not None
    assert again.projections is not None
    pairs: list[tuple[Tensor, Tensor]] = list(zip(heads.projections, again.projections, strict=True))
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55), ("qwen3-30b-a3b", 30.53), ("gpt-oss-20b", 20.91)],
)
def test_shapes_are_those_of_published_models(tmp_path: Path, shape: str, billions: float) -> None:
    random_model.write(tmp_path, shape)
    size = weights_bytes(read_config(tmp_path), torch.bfloat16, CUDA)
    assert size == pytest.approx(2e9 * billions, rel=1e-3)
