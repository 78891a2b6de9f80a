"""Adapters in the engine: many in one batch, and each one's text is that of a base that it is merged into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import LlamaForCausalLM

from manyheads import LLM, EngineConfig, SamplingParams
from manyheads.config import ConfigError
from manyheads.engine.engine import Engine
from manyheads.engine.runner import Runner
from manyheads.errors import RequestError
from manyheads.models.registry import read_config
from manyheads.ops.adapters import TorchAdapters
from manyheads.quantization.schemes import SCHEMES
from manyheads.request import EngineRequest
from tests.eagle3 import make_drafter
from tests.engine.test_exactness import engine, prompts
from tests.engine.test_graphs import record
from tests.kernels import INTERPRETED
from tests.lora import merged, save_adapter
from tests.tiny import make_model, save_model

ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {},
    "two": {"targets": ("q_proj", "v_proj"), "rank": 2, "seed": 1},
    "wide": {"targets": ("o_proj", "up_proj", "down_proj"), "rank": 8, "use_rslora": True, "seed": 2},
}
NAMES = ("", *ADAPTERS)


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, LlamaForCausalLM]:
    """By adapter, the base that it is merged into; the adapters stand beside the base."""
    base = save_model(folder)
    for name, settings in ADAPTERS.items():
        save_adapter(folder.parent / name, base, **settings)
    return {"": base} | {name: merged(base, folder.parent / name) for name in ADAPTERS}


def serve(folder: Path, tree_size: int | None, **settings: Any) -> Engine:
    return engine(folder, tree_size, loras={name: str(folder.parent / name) for name in ADAPTERS}, **settings)


def jobs(count: int, **more: Any) -> list[EngineRequest]:
    """Prompts with a shared beginning, of each adapter in turn."""
    return [
        EngineRequest(
            request_id=str(i),
            prompt_token_ids=prompt,
            params=SamplingParams(temperature=0.0, max_tokens=12 + i),
            lora=NAMES[i % len(NAMES)],
            **more,
        )
        for i, prompt in enumerate(prompts(count, shared=9))
    ]


def run(served: Engine, requests: list[EngineRequest]) -> list[list[int]]:
    texts: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        served.add_request(request)
    while served.has_work():
        for delta in served.step():
            assert delta.finish_reason in (None, "length")
            texts[delta.request_id] += delta.new_token_ids
        served.check_integrity()
    return list(texts.values())


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, request: EngineRequest) -> list[int]:
    ids, count = torch.tensor([request.prompt_token_ids]), request.params.max_tokens
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def of_models(models: dict[str, LlamaForCausalLM]) -> tuple[list[list[int]], list[list[int]]]:
    """Texts of 12 jobs, of the models that they ask for and of the base."""
    asked = jobs(12)
    return [greedy(models[request.lora], request) for request in asked], [greedy(models[""], r) for r in asked]


@pytest.mark.parametrize("tree_size", [1, 16, None])
def test_texts_are_those_of_merged_models(
    folder: Path, of_models: tuple[list[list[int]], list[list[int]]], tree_size: int | None, overlaps: bool
) -> None:
    """Side by side with the base's own, in chunks of 7, with pages for a fraction of what is asked."""
    served, asked = serve(folder, tree_size, max_num_batched_tokens=7), jobs(12)
    texts, (wanted, of_base) = run(served, asked), of_models
    assert texts == wanted
    same = [text == base for text, base, request in zip(texts, of_base, asked, strict=True) if request.lora]
    assert not any(same), "an adapter does nothing"
    stats = served.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    of_adapters = [
        sum(len(text) for text, request in zip(texts, asked, strict=True) if request.lora == name) for name in ADAPTERS
    ]
    assert [counts.generation_tokens for counts in stats.adapters.values()] == of_adapters
    assert list(stats.adapters) == list(ADAPTERS)
    if tree_size == 16:
        assert stats.accepted_tokens > sum(counts.accepted_tokens for counts in stats.adapters.values()) > 0
        assert stats.drafted_tokens > sum(counts.drafted_tokens for counts in stats.adapters.values()) > 0
        assert all(0 < counts.row_steps < counts.generation_tokens for counts in stats.adapters.values())


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the other tests run with kernels")
def test_kernels_add_the_same_in_recorded_steps(
    folder: Path, models: dict[str, LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose rows are padded: which tokens are whose is data."""
    monkeypatch.setattr(Runner, "overlaps", False)  # what a stand-in for a graph returns is not sent away
    adapters = pytest.importorskip("manyheads.ops.kernel_adapters").KernelAdapters(len(ADAPTERS))
    served, asked = serve(folder, 4), [shortened(request) for request in jobs(5)]
    record(served)
    monkeypatch.setattr(TorchAdapters, "plan", lambda self, which: adapters.plan(which))
    monkeypatch.setattr(TorchAdapters, "keep", lambda self, rows: adapters.keep(rows))
    monkeypatch.setattr(TorchAdapters, "add", lambda self, y, x, weights: adapters.add(y, x, weights))
    assert run(served, asked) == [greedy(models[request.lora], request) for request in asked]


def shortened(request: EngineRequest) -> EngineRequest:
    """The interpreter takes its time."""
    params = SamplingParams(temperature=0.0, max_tokens=6)
    return msgspec.structs.replace(request, params=params, prompt_token_ids=request.prompt_token_ids[-8:])


@pytest.mark.parametrize("kind", ["ngram", "eagle3"])
def test_any_drafter_guesses_for_adapters(folder: Path, models: dict[str, LlamaForCausalLM], kind: str) -> None:
    """EAGLE-3 keeps K/V of adapted states in the base's pages, which are each adapter's own."""
    settings: dict[str, Any] = {"drafter": "ngram"}
    if kind == "eagle3":
        make_drafter(folder.parent / "eagle3", read_config(folder), draft_vocab=11)
        settings = {"heads": str(folder.parent / "eagle3")}
    served, asked = serve(folder, 12, max_num_batched_tokens=7, **settings), jobs(12)
    assert run(served, asked) == [greedy(models[request.lora], request) for request in asked]
    stats = served.stats()
    assert stats.prefix_hits > 0
    assert sum(counts.accepted_tokens for counts in stats.adapters.values()) > 0


def test_an_int8_base_and_its_adapters_are_not_merged(folder: Path, models: dict[str, LlamaForCausalLM]) -> None:
    """Their sum is that of the rounded weights and the adapter in full."""
    rounded = make_model()
    rounded.load_state_dict(models[""].state_dict())
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = SCHEMES["int8"].quantize(module.weight.data).dequantize(torch.float32)
    oracles = {"": rounded} | {name: merged(rounded, folder.parent / name) for name in ADAPTERS}
    asked = jobs(8)
    texts = run(serve(folder, 8, quantization="int8"), asked)
    assert texts == [greedy(oracles[request.lora], request) for request in asked]


def test_adapters_share_no_pages(folder: Path, models: dict[str, LlamaForCausalLM]) -> None:
    """Nor with the base, whatever salt a request brings; one adapter's requests share theirs."""
    served, prompt = serve(folder, 1), prompts(1)[0] + [1] * 20
    assert len(prompt) > 20

    def cached(lora: str, salt: str = "") -> int:
        params = SamplingParams(temperature=0.0, max_tokens=1)
        request = EngineRequest(request_id="0", prompt_token_ids=prompt, params=params, lora=lora, cache_salt=salt)
        served.add_request(request)
        (last,) = (delta for _ in range(40) if served.has_work() for delta in served.step() if delta.finish_reason)
        return last.num_cached_tokens

    assert [cached(name) for name in NAMES] == [0] * len(NAMES)
    assert all(cached(name) > 0 for name in NAMES)
    assert [cached("", salt) for salt in ("all", "\xff" * 8 + "all")] == [0, 0]
    assert cached("two", "salt") == 0
    assert cached("two", "salt") > 0
    assert cached("", "salt") == 0


def test_a_text_goes_on_in_another_engine(folder: Path, models: dict[str, LlamaForCausalLM]) -> None:
    (request, *_) = (request for request in jobs(4) if request.lora == "two")
    text = greedy(models["two"], request)
    resumed = EngineRequest(
        request_id="again",
        prompt_token_ids=request.prompt_token_ids,
        params=request.params,
        lora=request.lora,
        output_token_ids=text[:9],
        resumes=True,
    )
    assert run(serve(folder, 8), [resumed]) == [text[9:]]


def test_llm_takes_adapters_by_name(folder: Path, models: dict[str, LlamaForCausalLM]) -> None:
    served, asked = serve(folder, 8), jobs(4)
    llm = LLM(engine=served)
    texts = [request.prompt_token_ids for request in asked]
    params = [request.params for request in asked]
    outputs = llm.generate(texts, params, lora=[request.lora for request in asked])
    wanted = [greedy(models[request.lora], request) for request in asked]
    assert [output.outputs[0].token_ids for output in outputs] == wanted
    with pytest.raises(RequestError, match=r"there is no adapter 'other'; there are: 'all', 'two', 'wide'"):
        llm.generate(texts, params, lora="other")
    with pytest.raises(RequestError, match="4 prompts but 1 adapters"):
        llm.generate(texts, params, lora=["two"])


def test_settings_that_cannot_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match="adapters need tensor_parallel_size=1, not 2"):
        EngineConfig(loras={"a": "there"}, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="an adapter needs a name"):
        EngineConfig(loras={"": "there"})
