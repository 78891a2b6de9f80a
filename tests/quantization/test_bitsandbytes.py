from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from manyheads import SamplingParams
from manyheads.config import ConfigError
from manyheads.ops.torch import TorchOps
from manyheads.quantization.schemes import SCHEMES, compress, compress_vocabulary, join
from tests.engine.test_exactness import engine, prompts, run
from tests.tiny import save_model

ERROR = {"bitsandbytes-8bit": 0.02, "bitsandbytes-4bit": 0.15}


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        compress(torch.ones(64, 64), SCHEMES["bitsandbytes-8bit"])
    assert isinstance(compress_vocabulary(torch.ones(64, 64), SCHEMES["bitsandbytes-8bit"]), torch.Tensor)


@pytest.mark.parametrize("scheme", ERROR)
def test_products(scheme: str) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weights, bias, x = [torch.randn(64, 128), torch.randn(32, 128)], torch.randn(96), torch.randn(5, 128)
    whole = join([compress(weight, SCHEMES[scheme]) for weight in weights])
    product = TorchOps().product(whole, bias, torch.float32)
    assert (product.out_features, product.in_features) == (96, 128)
    wanted = x @ torch.cat(weights).T + bias
    with torch.inference_mode():
        found = product(x)
        assert torch.equal(product.parts(x), found)
    assert not product.can_be_captured
    assert 0 < (found - wanted).norm() / wanted.norm() < ERROR[scheme]
    bits = 8 if scheme == "bitsandbytes-8bit" else 4
    assert product.nbytes == 96 * 128 * bits // 8 + 4 * 96 * (1 if bits == 8 else 2) + 4 * 96


@pytest.mark.parametrize("scheme", ERROR)
def test_engine(scheme: str, tmp_path: Path) -> None:
    """With LLM.int8() a text depends on the rows beside it; that of 4 bits is the same with and without trees."""
    pytest.importorskip("bitsandbytes")
    save_model(tmp_path / "model", hidden=64, intermediate=128, head_dim=16)
    jobs = [(prompt, SamplingParams(temperature=0.0, max_tokens=12)) for prompt in prompts(4)]
    plain, tree = (run(engine(tmp_path / "model", size, quantization=scheme), jobs) for size in (1, 4))
    assert [len(text) for text in tree] == [12] * 4
    if scheme == "bitsandbytes-4bit":
        assert tree == plain


def test_shapes_that_4_bits_cannot_hold() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match="one has 48"):
        compress(torch.ones(48, 64), SCHEMES["bitsandbytes-4bit"])
