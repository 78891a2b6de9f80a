"""The engine against the model itself: greedy text token for token, sampled text by its distribution."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaForCausalLM

from manyheads import EngineConfig, SamplingParams
from manyheads.engine.build import build_engine
from manyheads.engine.engine import Engine
from manyheads.request import EngineRequest
from tests.eagle3 import drafter_of
from tests.tiny import VOCAB

TREES = [1, 4, 16, 64, None]


def engine(folder: Path, tree_size: int | None, **settings: Any) -> Engine:
    settings = {"seed": 0, "max_num_seqs": 6, "max_num_batched_tokens": 8, "block_size": 4, "num_blocks": 40} | settings
    return build_engine(
        EngineConfig(model=str(folder), dtype="float32", tree_size=tree_size, num_threads=1, **settings)
    )


def run(engine: Engine, jobs: list[tuple[list[int], SamplingParams]], rate: float = 1.0) -> list[list[int]]:
    """Everyone's tokens, while requests arrive with probability `rate` before each step."""
    rng = random.Random(0)
    waiting = list(enumerate(jobs))[::-1]
    replies: dict[str, list[int]] = {str(i): [] for i in range(len(jobs))}
    finished: list[str] = []
    while waiting or engine.has_work():
        while waiting and rng.random() < rate and len(engine.scheduler.waiting) < engine.scheduler.max_queue:
            i, (prompt, params) = waiting.pop()
            engine.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
        for delta in engine.step():
            assert delta.request_id not in finished
            replies[delta.request_id] += delta.new_token_ids
            if delta.finish_reason is not None:
                finished.append(delta.request_id)
        engine.check_integrity()
    assert len(finished) == len(jobs)
    return list(replies.values())


def prompts(count: int, shared: int = 0) -> list[list[int]]:
    rng = random.Random(1)
    common = [rng.randrange(VOCAB) for _ in range(shared)]
    return [common + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))] for _ in range(count)]


GREEDY = [(p, SamplingParams(temperature=0.0, max_tokens=14 + i)) for i, p in enumerate(prompts(16, shared=9))]


@pytest.fixture(scope="module")
def texts(reference: LlamaForCausalLM) -> list[list[int]]:
    """What the model itself says to GREEDY."""
    found = []
    for prompt, params in GREEDY:
        ids, count = torch.tensor([prompt]), params.max_tokens
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("tree_size", TREES)
def test_greedy_text_is_the_models(folder: Path, texts: list[list[int]], tree_size: int | None, overlaps: bool) -> None:
    """Random arrivals, chunks of 8 tokens, a shared prefix, and pages for a fraction of what is asked."""
    served = engine(folder, tree_size)
    assert served.runner.overlaps == overlaps
    assert run(served, GREEDY, rate=0.3) == texts
    stats = served.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    if tree_size not in (1, None):
        assert stats.accepted_tokens > 0


@pytest.mark.parametrize(("drafter", "trees"), [("medusa", (1, 16, None)), ("eagle3", (5,))], ids=["Medusa", "EAGLE-3"])
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_text_of_a_cache_in_8_bits_is_one(
    folder: Path, reference: LlamaForCausalLM, kv_dtype: str, drafter: str, trees: tuple[int | None, ...]
) -> None:
    """With any tree, chunks, preemption and shared prefixes it is what each gets alone, greedy and sampled; it is not
    the model's own."""
    jobs = [
        (p, SamplingParams(temperature=i % 2, seed=i, max_tokens=14 + i)) for i, p in enumerate(prompts(8, shared=9))
    ]
    heads = str(drafter_of(folder, drafter))
    alone = engine(folder, 1, kv_cache_dtype=kv_dtype, max_num_seqs=1, max_num_batched_tokens=256, prefix_caching=False)
    wanted = run(alone, jobs)
    assert wanted != run(engine(folder, 1), jobs)
    for tree_size in trees:
        served = engine(folder, tree_size, kv_cache_dtype=kv_dtype, heads=heads)
        assert served.ready.drafter == drafter
        assert run(served, jobs, rate=0.6) == wanted
        stats = served.stats()
        assert stats.preemptions > 0
        assert stats.prefix_hits > 0
        if tree_size not in (1, None):
            assert stats.accepted_tokens > 0


def distribution(model: LlamaForCausalLM, prompt: list[int], temperature: float) -> torch.Tensor:
    """[V, V]: probability of the second and third token after the prompt."""

    def following(texts: list[list[int]]) -> torch.Tensor:
        with torch.inference_mode():
            return (model(torch.tensor(texts)).logits[:, -1].double() / temperature).softmax(-1)

    first = following([prompt])[0]
    second = following([[*prompt, a] for a in range(VOCAB)])
    third = following([[*prompt, a, b] for a in range(VOCAB) for b in range(VOCAB)]).view(VOCAB, VOCAB, VOCAB)
    return torch.einsum("a,ab,abc->bc", first, second, third)


@pytest.mark.parametrize("tree_size", [1, 16])
def test_sampled_text_has_the_models_distribution(folder: Path, reference: LlamaForCausalLM, tree_size: int) -> None:
    prompt, count = prompts(1)[0][:12], 2000
    wanted = distribution(reference, prompt, 0.8).flatten() * count
    served = engine(folder, tree_size, max_num_seqs=64, max_num_batched_tokens=512, num_blocks=2000)
    jobs = [(prompt, SamplingParams(temperature=0.8, max_tokens=3, seed=seed)) for seed in range(count)]
    seen = Counter(VOCAB * b + c for _, b, c in run(served, jobs))
    often = wanted >= 5
    observed = torch.tensor([seen[i] for i in range(VOCAB**2)], dtype=torch.float64)
    cells = [*observed[often].tolist(), float(observed[~often].sum())]
    expected = [*wanted[often].tolist(), float(wanted[~often].sum())]
    assert len(cells) > 20
    assert chisquare(cells, expected).pvalue > 1e-3
    # the test can fail: the same counts are no sample of the distribution at another temperature
    other = distribution(reference, prompt, 1.0).flatten() * count
    assert chisquare(cells, [*other[often].tolist(), float(other[~often].sum())]).pvalue < 1e-6
    if tree_size > 1:
        assert served.stats().accepted_tokens > 0


def test_a_seed_gives_the_same_text_whatever_else_runs(
    folder: Path, reference: LlamaForCausalLM, overlaps: bool
) -> None:
    asked = prompts(20)
    params = [SamplingParams(temperature=1.0, top_p=0.9, max_tokens=20, seed=i) for i in range(20)]
    alone = [run(engine(folder, 1), [job])[0] for job in zip(asked[:4], params[:4], strict=True)]
    for tree_size in (1, 16):
        assert run(engine(folder, tree_size), list(zip(asked, params, strict=True)), rate=0.5)[:4] == alone
