"""Steps by graph without a GPU: a recorded step is a function that is called again and writes into the same tensors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from manyheads import SamplingParams
from manyheads.engine.graphs import StepGraphs, padded_rows
from manyheads.engine.runner import Runner
from manyheads.medusa.planner import Planner
from tests.engine.test_exactness import engine, prompts, run


class Recorded:
    """What a CUDA graph is to `StepGraphs`."""

    def __init__(self, function: Callable[[], Any], result: Any) -> None:
        self.function, self.result = function, result

    def replay(self) -> None:
        for old, new in zip(tensors(self.result), tensors(self.function()), strict=True):
            old.copy_(new)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.name not in ("tree", "index"):  # inputs
                yield from tensors(getattr(value, field.name))


@pytest.fixture
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: StepGraphs, function: Callable[[], Any]) -> tuple[Recorded, Any]:
        result = function()
        return Recorded(function, result), result

    monkeypatch.setattr(StepGraphs, "_record", record)
    monkeypatch.setattr(StepGraphs, "_aside", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)


@pytest.mark.usefixtures("_recorded")
def test_memory_of_graphs_is_what_capturing_took(
    folder: Path, reference: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine(folder, 1).runner
    assert isinstance(runner, Runner)
    looks = iter((1000, 1300, 1300, 1350))
    monkeypatch.setattr("manyheads.engine.graphs.taken_bytes", lambda _: next(looks))
    graphs = StepGraphs(runner)
    assert graphs.memory_bytes == 0
    graphs.capture(Planner([[0.5, 0.3]] * 3), 12)
    assert graphs.memory_bytes == 300
    assert len(graphs._graphs) > 4
    graphs._make([(2, 64, 128)])
    assert graphs.memory_bytes == 350


@pytest.mark.usefixtures("_recorded")
@pytest.mark.parametrize("tree_size", [1, 2, 4, 16])
def test_text_is_that_of_steps_without_graphs(folder: Path, reference: LlamaForCausalLM, tree_size: int) -> None:
    """Greedy, sampled, with penalties, and rows that no graph serves; few pages, and rows that come and go."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.0, "speculative": False},
    ]
    jobs = [
        (prompt, SamplingParams(max_tokens=10 + i, seed=i, **kinds[i % len(kinds)]))
        for i, prompt in enumerate(prompts(16, shared=9))
    ]
    wanted = run(engine(folder, tree_size, num_blocks=24), jobs, rate=0.4)
    served = engine(folder, tree_size, num_blocks=24)
    runner = served.runner
    assert isinstance(runner, Runner)
    runner.graphs = StepGraphs(runner)
    assert run(served, jobs, rate=0.4) == wanted
    assert len(runner.graphs._graphs) > 2
    assert served.stats().preemptions > 0


def test_padding() -> None:
    assert [padded_rows(n, 256) for n in (1, 3, 5, 33, 200)] == [1, 3, 6, 40, 256]
    assert padded_rows(5, 5) == 5
    assert padded_rows(300, 512) == 320
