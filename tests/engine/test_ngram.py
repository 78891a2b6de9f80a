"""A drafter that every model has: text stays the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from manyheads import ConfigError, EngineConfig, SamplingParams
from manyheads.engine.build import build_engine
from tests.engine.test_exactness import engine, prompts, run


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("tree_size", [2, 8, 32])
def test_text_is_that_of_plain_decoding(folder: Path, tree_size: int) -> None:
    """Greedy, sampled, with penalties and log-probabilities; few pages, so that requests step back and go on."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 2},
        {"temperature": 0.0, "speculative": False},
    ]
    jobs = [
        (prompt, SamplingParams(max_tokens=12 + i % 5, seed=i, **kinds[i % len(kinds)]))
        for i, prompt in enumerate(prompts(12, shared=9))
    ]
    plain = run(engine(folder, 1, num_blocks=24), jobs, rate=0.4)
    served = engine(folder, tree_size, num_blocks=24, drafter="ngram")
    assert run(served, jobs, rate=0.4) == plain
    stats = served.stats()
    assert stats.preemptions > 0
    assert stats.accepted_tokens > 0


def test_a_text_that_repeats_itself_takes_few_steps(folder: Path, reference: LlamaForCausalLM) -> None:
    """A tiny model soon goes round in circles, and the drafter follows it there."""
    served = engine(folder, 16, drafter="ngram")
    found = run(served, [(prompts(1)[0], SamplingParams(max_tokens=60, temperature=0.0))], rate=1.0)
    stats = served.stats()
    assert len(found) == 1
    assert stats.generation_tokens / stats.row_steps > 2


def test_heads_and_ngram_exclude_each_other(folder: Path, reference: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ngram needs no heads"):
        EngineConfig(model=str(folder), heads=str(folder / "heads"), drafter="ngram")
    with pytest.raises(ConfigError, match="drafter must be one of medusa, eagle3, ngram"):
        EngineConfig(drafter="eagle")
    plain = tmp_path / "plain"
    reference.save_pretrained(plain)
    with pytest.raises(ConfigError, match="has no heads; name some"):
        build_engine(EngineConfig(model=str(plain), drafter="medusa"))
