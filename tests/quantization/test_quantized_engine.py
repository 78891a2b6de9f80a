"""The engine with quantized weights against transformers with the same weights, widened: the same text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from manyheads import SamplingParams
from manyheads.config import ConfigError, EngineConfig
from manyheads.ops import integer
from manyheads.ops.integer import IntegerProduct
from manyheads.ops.products import CodesProduct
from manyheads.quantization.base import CodedScheme, CodedWeight
from manyheads.quantization.schemes import SCHEMES
from tests.eagle3 import drafter_of
from tests.engine.conftest import little_patience  # noqa: F401
from tests.engine.test_exactness import engine, prompts, run
from tests.tiny import save_model

M = TypeVar("M", bound=PreTrainedModel)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny") / "model"


@pytest.fixture(scope="module")
def plain(folder: Path) -> LlamaForCausalLM:
    return save_model(folder, hidden=64, intermediate=96)


def widened(model: M, scheme: str) -> M:
    """The model with weights that have gone through a scheme: of projections and, one by one, of experts.

    A vocabulary's projection that is tied to the embedding becomes a copy.
    """

    def rounded(weight: Tensor, scheme: str) -> Tensor:
        coded = SCHEMES[scheme].quantize(weight)
        assert isinstance(coded, CodedWeight)
        return coded.dequantize(torch.float32)

    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            chosen = "int8" if name == "lm_head" and scheme == "int4" else scheme
            module.weight = torch.nn.Parameter(rounded(module.weight.data, chosen))
    for module in model.modules():
        is_transposed = getattr(module, "is_transposed", False)  # transformers' experts say so
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 3:
                weights = parameter.data.mT if is_transposed else parameter.data
                coded = torch.stack([rounded(expert, scheme) for expert in weights])
                parameter.data = coded.mT.contiguous() if is_transposed else coded
    return model


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("drafter", "trees"), [("medusa", (1, 16, None)), ("eagle3", (1, 5))], ids=["Medusa", "EAGLE-3"]
)
@pytest.mark.parametrize("form", [*(s.name for s in SCHEMES.values() if isinstance(s, CodedScheme)), "integer"])
def test_text_is_that_of_the_widened_weights(
    folder: Path,
    plain: LlamaForCausalLM,
    form: str,
    drafter: str,
    trees: tuple[int | None, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sampled text is that without trees."""
    scheme = form
    if form == "integer":
        if not integer.is_exact():
            pytest.skip("this processor has no exact products of bytes")
        monkeypatch.setattr(integer, "LEAST_SIZE", 0)
        scheme = "int8"
    reference = widened(plain, scheme)
    jobs = [(p, SamplingParams(temperature=0.0, max_tokens=20 + i)) for i, p in enumerate(prompts(6, shared=9))]
    wanted = [greedy(reference, prompt, params.max_tokens or 0) for prompt, params in jobs]
    assert wanted != [greedy(plain, prompt, params.max_tokens or 0) for prompt, params in jobs]  # it is another model
    sampled = [(p, SamplingParams(temperature=1.0, seed=i, max_tokens=20)) for i, (p, _) in enumerate(jobs)]
    for tree_size in trees:
        served = engine(folder, tree_size, quantization=scheme, heads=str(drafter_of(folder, drafter)))
        assert (served.ready.quantization, served.ready.drafter) == (scheme, drafter)
        texts = run(served, [*jobs, *sampled], rate=0.5)
        assert texts[: len(jobs)] == wanted
        if tree_size == 1:
            drawn = texts[len(jobs) :]
        assert texts[len(jobs) :] == drawn
        forms = {type(layer.qkv.product) for layer in served.runner.model.layers}
        expected = IntegerProduct if form == "integer" else CodesProduct
        assert form not in ("int8", "fp8", "integer") or forms == {expected}
        if tree_size in (5, 16):
            assert served.stats().accepted_tokens > 0


def test_heads_are_rounded_too(folder: Path, plain: LlamaForCausalLM) -> None:
    served = {scheme: engine(folder, 4, quantization=scheme) for scheme in ("none", "int8")}
    heads = {scheme: e.runner.drafter.heads for scheme, e in served.items()}
    assert heads["int8"] is not None
    assert heads["int8"]._first is not None
    assert isinstance(heads["int8"]._first.product, CodesProduct)
    hidden = torch.randn(5, 64)
    plain_chances, chances = (h.candidates(hidden, 16)[1] for h in heads.values() if h is not None)
    assert not torch.equal(plain_chances, chances)
    torch.testing.assert_close(chances, plain_chances, atol=0.02, rtol=0.1)


def test_settings() -> None:
    with pytest.raises(ConfigError, match="quantization must be one of none, int8, fp8, int4, bitsandbytes-8bit"):
        EngineConfig(quantization="int3")


def test_shapes_that_int4_cannot_hold(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="one has 48 columns"):
        engine(tmp_path / "model", 1, quantization="int4")
