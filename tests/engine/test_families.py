"""Every family through the engine: greedy text is that of transformers, with any tree, in chunks, preempted."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyheads import SamplingParams
from manyheads.attention.torch import TorchAttention
from manyheads.models.registry import read_config
from manyheads.request import RequestDelta
from tests.engine.test_exactness import engine, run
from tests.models.families import MODELS, SERVED, reference
from tests.tiny import VOCAB, save_heads

PROMPTS, NEW_TOKENS = (int(n) for n in os.environ.get("FAMILY_TEXTS", "3x12").split("x"))
"""How many prompts, and how many tokens are added to each."""
TREES = (1, 8, 32)
"""Nodes; one is plain decoding."""


def save(folder: Path, name: str, **changes: Any) -> PreTrainedModel:
    """A model of 16 tokens with random heads, whose ten candidates each are often right.

    Args:
        changes: of its configuration.
    """
    model = reference(name, vocab_size=VOCAB, **changes)
    model.save_pretrained(folder)
    save_heads(folder, model.config.hidden_size)
    return model


def some_jobs(num_prompts: int, new_tokens: int) -> list[tuple[list[int], SamplingParams]]:
    """Random prompts of up to 40 tokens, to each of which so many are added."""
    choose = random.Random(1)
    prompts = [[choose.randrange(VOCAB) for _ in range(choose.randint(1, 40))] for _ in range(num_prompts)]
    return [(prompt, SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)) for prompt in prompts]


def compare(folder: Path, model: torch.nn.Module, num_prompts: int, new_tokens: int, **settings: Any) -> None:
    """Hold greedy text against transformers': in chunks of 7, with few pages plain and with trees of 8 nodes, and with
    room for trees of 32.

    Args:
        folder: where the model stands that is served.
        model: says what the text should be.
        settings: of the engine.
    """
    jobs = some_jobs(num_prompts, new_tokens)
    shape = read_config(folder).kv_shape
    near = 0 if shape.window is None else -(-shape.window // 4) + 2  # pages of a text that have companions, if any do
    pages = max(-(-(len(prompt) + new_tokens) // 4) for prompt, _ in jobs) + 8  # for a tree
    pages += shape.num_companions * (near + 8)
    texts, preemptions = [], 0
    for tree_size in TREES:
        room = pages if tree_size < max(TREES) else 4 * pages  # pages that are few make large trees small ones
        served = engine(folder, tree_size, max_num_batched_tokens=7, num_blocks=room, **settings)
        texts.append(run(served, jobs))
        stats = served.stats()
        preemptions += stats.preemptions
        assert tree_size == 1 or stats.accepted_tokens > 0
    assert preemptions > 0 or served.scheduler.pages.window is not None  # which takes fewer pages
    assert texts[0] == texts[1] == texts[2]
    for (prompt, _), text in zip(jobs, texts[0], strict=True):
        assert len(text) == new_tokens
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == text


@pytest.mark.parametrize("name", SERVED)
def test_greedy_text_is_transformers(tmp_path: Path, name: str) -> None:
    compare(tmp_path, save(tmp_path, name), PROMPTS, NEW_TOKENS)


@pytest.mark.parametrize("name", [name for name in SERVED if MODELS[name][0] == "gpt_oss"])
def test_texts_need_the_sinks(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are so large that rows which ignore them as they decode, and not in their prompts, get other texts."""
    save(tmp_path, name)
    jobs = some_jobs(3, 20)
    texts = run(engine(tmp_path, 1), jobs)
    attend, ignored = TorchAttention._attend_by_scores, list[int]()

    def without(
        self: TorchAttention, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        if queries.shape[2] == self.queries_per_kv:  # a token a row
            ignored.append(len(queries))
            sinks = None
        return attend(self, queries, keys, values, mask, sinks)

    monkeypatch.setattr(TorchAttention, "_attend_by_scores", without)
    others = run(engine(tmp_path, 1), jobs)
    assert ignored
    assert sum(text != other for text, other in zip(texts, others, strict=True)) >= 2


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_layers_with_windows_hold_few_companions(tmp_path: Path, prefix_caching: bool) -> None:
    """Seven layers of which one looks to the beginning, in chunks of 7 and trees of 8 nodes, in pages of 4."""
    model = save(tmp_path, "gemma3", num_hidden_layers=7, layer_types=[*["sliding_attention"] * 6, "full_attention"])
    served = engine(tmp_path, 8, max_num_batched_tokens=7, num_blocks=400, prefix_caching=prefix_caching)
    pages = served.scheduler.pages
    assert (pages.num_companions, pages.window, pages.longest_text) == (6, 5, (400 - 6 * 4) * 4)
    prompts = [[random.Random(seed).randrange(VOCAB) for _ in range(50)] for seed in range(2)]
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    needed = []
    step = served.step

    def watched() -> list[RequestDelta]:
        deltas = step()
        needed.append(pages.num_needed)
        return deltas

    served.step = watched  # type: ignore[method-assign]
    texts = run(served, [(prompt, params) for prompt in prompts])
    assert max(needed) <= 2 * (28 + 6 * 12)  # of 2 * 7 * 28; a tree reserves up to 32 slots
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == text
    served.step = step  # type: ignore[method-assign]
    fewer = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    again = [(prompts[0] + texts[0][:20], fewer), (prompts[1], params)]
    assert run(served, again) == [texts[0][20:], texts[1]]  # some of the companions were given back
    assert (served.stats().prefix_hits > 0) == prefix_caching


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_text_holds_the_pages_of_its_window(tmp_path: Path, prefix_caching: bool) -> None:
    """A window of 7 tokens, chunks of 7 and trees of 8 nodes, in pages of 4."""
    model = save(tmp_path, "mistral with a window")
    served = engine(tmp_path, 8, max_num_batched_tokens=7, num_blocks=64, prefix_caching=prefix_caching)
    prompt = [random.Random(2).randrange(VOCAB) for _ in range(50)]
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    held = []
    step = served.step

    def watched() -> list[RequestDelta]:
        deltas = step()
        held.extend(len(request.table.held) for request in served.scheduler.running)
        return deltas

    served.step = watched  # type: ignore[method-assign]
    [text] = run(served, [(prompt, params)])
    assert max(held) <= 12  # of 28; a tree reserves up to 32 slots
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == text
    served.step = step  # type: ignore[method-assign]
    assert run(served, [(prompt, params)]) == [text]  # with the prefix cache, over pages that were given back
    assert (served.stats().prefix_hits > 0) == prefix_caching
