"""A model without a file of weights is loaded and served, with heads whose candidates are accepted by chance."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from manyheads.models import loader
from manyheads.models.loader import load_model
from manyheads.models.registry import read_config
from manyheads.models.size import weights_bytes
from manyheads.request import EngineRequest, SamplingParams
from manyheads.speculation.medusa import drafter
from tests.benchmarks.test_by_chance import restored as restored
from tests.engine.test_exactness import engine

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import by_chance
import random_model

CPU = torch.device("cpu")
SMALL = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16, "head_dim": 16,
         "num_experts": 8, "num_local_experts": 8, "intermediate_size": 32, "moe_intermediate_size": 32}  # fmt: skip


@pytest.mark.parametrize("shape", random_model.SHAPES)
@pytest.mark.usefixtures("restored")
def test_a_shape_is_served(tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((loader, "tensor_files"), (loader, "read_tensors"), (drafter, "read_heads")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back in the end
    full = random_model.SHAPES[shape]
    monkeypatch.setitem(random_model.SHAPES, shape, full | {key: SMALL[key] for key in full.keys() & SMALL.keys()})
    random_model.write(tmp_path, shape)
    random_model.install(tmp_path, CPU)
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


@pytest.mark.parametrize(("shape", "billions"), [("qwen3-30b-a3b", 30.53), ("gpt-oss-20b", 20.91)])
def test_shapes_are_those_of_published_models(tmp_path: Path, shape: str, billions: float) -> None:
    random_model.write(tmp_path, shape)
    size = weights_bytes(read_config(tmp_path), torch.bfloat16, torch.device("cuda"))
    assert size == pytest.approx(2e9 * billions, rel=1e-3)
