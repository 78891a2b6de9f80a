"""The engine on a GPU, where steps are graphs that compute in one pool of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manyheads import EngineConfig, SamplingParams
from manyheads.checkpoint import BUILTIN_FOLDER
from manyheads.engine.build import build_engine
from manyheads.request import EngineRequest, RequestDelta
from tests.engine.test_families import save
from tests.tiny import VOCAB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_prompt_in_the_same_step_leaves_reports_alone() -> None:
    """Steps of a fixed size are captured when they are first needed, in memory that prompts' graphs compute in too."""
    prompts = [[7 + (i * 31 + j) % 900 for j in range(20 + 9 * i)] for i in range(40)]
    assert replies(BUILTIN_FOLDER, prompts, tree_size=16) == replies(BUILTIN_FOLDER, prompts, tree_size=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_was_guessed_is_told_of_the_same_step() -> None:
    """Which nodes a row brought lies in a graph's memory, and is sent before another graph runs there."""
    prompts = [[7 + (i * 31 + j) % 900 for j in range(20 + 9 * i)] for i in range(40)]
    told: list[RequestDelta] = []
    assert replies(BUILTIN_FOLDER, prompts, 16, told) == replies(BUILTIN_FOLDER, prompts, 16)
    for delta in told:
        assert delta.trace is not None
        right = [guess.token_id for guess in delta.trace.guesses if guess.accepted]
        if delta.finish_reason is None:  # the last step may be cut by the limit
            assert right == delta.new_token_ids[:-1]
    assert sum(len(delta.trace.guesses) for delta in told if delta.trace is not None) > 2 * len(told)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_of_experts_are_recorded(tmp_path: Path) -> None:
    """And the texts are the same with trees and without, though blocks of experts differ."""
    save(tmp_path, "qwen3 with experts", head_dim=16, max_position_embeddings=1024)
    prompts = [[(i * 31 + j * j) % VOCAB for j in range(20 + 9 * i)] for i in range(16)]
    engine = build_engine(EngineConfig(model=str(tmp_path), dtype="float32", max_num_seqs=16))
    assert engine.runner.recorded is not None
    assert replies(tmp_path, prompts, tree_size=16) == replies(tmp_path, prompts, tree_size=1)


def replies(
    model: Path, prompts: list[list[int]], tree_size: int, told: list[RequestDelta] | None = None
) -> list[list[int]]:
    """Requests come two a step, so that most steps compute prompts too.

    Args:
        told: takes the deltas, of requests that then ask for their steps.
    """
    settings = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 16}
    engine = build_engine(EngineConfig(model=str(model), tree_size=tree_size, **settings))
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, return_steps=told is not None)
    waiting = list(enumerate(prompts))[::-1]
    found: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    while waiting or engine.has_work():
        for _ in range(min(2, len(waiting))):
            i, prompt = waiting.pop()
            engine.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
        for delta in engine.step():
            found[delta.request_id] += delta.new_token_ids
            if told is not None:
                told.append(delta)
        engine.check_integrity()
    return list(found.values())
