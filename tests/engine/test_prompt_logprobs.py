"""Log-probabilities of prompts against the model itself: in chunks and slices, with preemption and shared prefixes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from manyheads import EngineConfig, SamplingParams
from manyheads.engine import logprobs
from manyheads.engine.build import build_engine
from manyheads.engine.engine import Engine
from manyheads.engine.runner import Runner
from manyheads.request import EngineRequest, RequestDelta
from tests.tiny import VOCAB

SHARED = [5, 3, 1, 4, 1, 5, 9, 2, 6, 5]
PROMPTS = [SHARED + [(i * k) % VOCAB for k in range(2 + 5 * i)] for i in range(8)]


@pytest.fixture
def engine(folder: Path, reference: LlamaForCausalLM, overlaps: bool, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(logprobs, "AT_ONCE", 3)
    settings = {"max_num_seqs": 6, "max_num_batched_tokens": 8, "block_size": 4, "num_blocks": 36, "tree_size": 16}
    return build_engine(EngineConfig(model=str(folder), dtype="float32", num_threads=1, **settings))


def run(engine: Engine, asked: list[SamplingParams]) -> list[list[RequestDelta]]:
    deltas: list[list[RequestDelta]] = [[] for _ in asked]
    for i, params in enumerate(asked):
        message = EngineRequest(request_id=str(i), prompt_token_ids=PROMPTS[i % len(PROMPTS)], params=params.validate())
        engine.add_request(message)
    while engine.has_work():
        for delta in engine.step():
            deltas[int(delta.request_id)].append(delta)
        engine.check_integrity()
    return deltas


@torch.inference_mode()
def check(reference: LlamaForCausalLM, prompt: list[int], delta: RequestDelta, count: int) -> None:
    wanted = torch.log_softmax(reference(torch.tensor([prompt])).logits[0].float(), dim=-1)
    entries = delta.prompt_logprobs
    assert entries is not None
    assert [entry.token_id for entry in entries] == prompt[1:]
    for row, entry in zip(wanted, entries, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
        values, ids = row.topk(count)
        assert [t for t, _ in entry.top] == ids.tolist()
        assert [v for _, v in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_they_are_the_models(engine: Engine, reference: LlamaForCausalLM) -> None:
    """Others that ask for none run beside, and leave their pages to be shared; there are too few for all."""
    asked = [
        SamplingParams(temperature=0.0, max_tokens=[0, 3, 40][i % 3], prompt_logprobs=None if i % 4 == 3 else i % 4)
        for i in range(16)
    ]
    found = run(engine, asked)
    assert engine.stats().preemptions > 0
    assert engine.stats().prefix_hits > 0
    for i, (params, deltas) in enumerate(zip(asked, found, strict=True)):
        if params.prompt_logprobs is not None:
            check(reference, PROMPTS[i % len(PROMPTS)], deltas[0], params.prompt_logprobs)
            assert deltas[-1].num_cached_tokens == 0
        assert all(delta.prompt_logprobs is None for delta in deltas[params.prompt_logprobs is not None :])
        assert sum(len(delta.new_token_ids) for delta in deltas) == params.max_tokens
        assert deltas[-1].finish_reason == "length"


def test_what_is_no_number_is_an_error_for_who_asks(
    engine: Engine, reference: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else reads what the model makes of a prompt's inner tokens."""
    with torch.inference_mode():
        best = [reference(torch.tensor([prompt])).logits[0].argmax(-1).tolist() for prompt in PROMPTS[:3]]
    odd = next(token for token in best[1] if token not in {tokens[-1] for tokens in best})
    assert isinstance(engine.runner, Runner)
    model = engine.runner.model
    logits = model.logits

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        found = logits(hidden)
        return found.masked_fill_((found.argmax(-1) == odd)[:, None], float("inf"))

    monkeypatch.setattr(model, "logits", broken)
    asked = [SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=count) for count in (None, 2, None)]
    deltas = run(engine, asked)
    assert [some[-1].finish_reason for some in deltas] == ["length", "error", "length"]
    assert "not finite for the prompt" in (deltas[1][-1].error or "")
    assert all(delta.prompt_logprobs is None for delta in deltas[1])


def test_a_prompt_of_one_token_has_none(engine: Engine) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=2)
    engine.add_request(EngineRequest(request_id="x", prompt_token_ids=[4], params=params))
    (delta,) = [delta for _ in range(3) for delta in engine.step()]
    assert (delta.prompt_logprobs, delta.new_token_ids, delta.finish_reason) == ([], [], "length")


def test_a_salt_keeps_prefixes_apart(engine: Engine) -> None:
    def cached(name: str, salt: str) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=1)
        prompt = PROMPTS[3]
        engine.add_request(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params, cache_salt=salt))
        (last,) = [d for _ in iter(engine.has_work, False) for d in engine.step() if d.finish_reason]
        return last.num_cached_tokens

    salts = ["", "", "a", "a", "b", ""]
    assert [cached(str(i), salt) > 0 for i, salt in enumerate(salts)] == [False, True, False, True, False, True]
