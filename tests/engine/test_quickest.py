"""Which numbers of tokens are computed instead of others."""

from __future__ import annotations

import pytest
import torch

from manyheads import EngineConfig
from manyheads.engine.build import build_engine
from manyheads.engine.quickest import MOST_ADDED, STEP, choose, linears_of, quickest
from manyheads.engine.runner import Runner


def test_more_tokens_are_chosen_where_they_take_less() -> None:
    took = {128: 1e-5, 144: 1.01e-5, 160: 0.85e-5, 176: 2e-4, 192: 2e-4, 208: 1.3e-4, 224: 1.4e-4, 240: 2e-4}
    took |= {256: 1.29e-4, 272: 1.28e-4}
    asked: list[list[int]] = []

    def measure(sizes: list[int]) -> dict[int, float]:
        asked.append(sizes)
        return {size: took.get(size, 1.0) for size in sizes}

    assert choose({64, 128, 176, 256}, measure) == {128: 128, 176: 208, 256: 256}, (
        "what is little, or a small share, is not worth it"
    )
    assert asked == [[*range(128, 256 + MOST_ADDED + 1, STEP)]], "each once"
    assert choose([64, 112], measure) == {}, "few tokens wait for weights, as many as they may be"
    assert len(asked) == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products_are_measured_on_a_gpu(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    runner = build_engine(EngineConfig(device=device, max_num_seqs=2, max_model_len=256)).runner
    assert isinstance(runner, Runner)
    assert len(linears_of(runner.model.layers[0])) == 4
    sizes = [64, 128, 416, 1088]
    found = quickest(runner.model, sizes)
    if device == "cpu":
        assert found == {}
    else:
        assert found.keys() == {128, 416, 1088}
        assert all(size <= other <= size + MOST_ADDED and other % STEP == 0 for size, other in found.items())
