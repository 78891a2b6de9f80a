"""Steps by graph without a GPU: a recorded step is a function that is called again and writes into the same tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from manyheads import SamplingParams
from manyheads.engine import decode, state
from manyheads.engine.graphs import StepGraphs, padded_rows
from manyheads.engine.runner import Runner
from manyheads.models import ops
from tests.engine.test_exactness import engine, prompts, run
from tests.kernels import INTERPRETED


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


@pytest.mark.skipif(not INTERPRETED, reason="the engine's tests are on the CPU")
@pytest.mark.usefixtures("_recorded", "reference")
@pytest.mark.parametrize("tree_size", [1, 4])
def test_text_is_the_same_with_kernels(folder: Path, tree_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees, verdicts and candidates as on a GPU, in steps with and without a graph; the model as on a CPU."""
    pytest.importorskip("triton")
    topk = importlib.import_module("manyheads.kernels.topk")
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.0, "speculative": False},
        {"temperature": 1.0, "acceptance": "typical"},
    ]
    jobs = [
        (prompt, SamplingParams(max_tokens=8 + i % 3, seed=i, **kinds[i % len(kinds)]))
        for i, prompt in enumerate(prompts(7, shared=9))
    ]
    wanted = run(engine(folder, tree_size, num_blocks=24), jobs, rate=0.4)
    for module in (decode, state):
        monkeypatch.setattr(module, "has_kernels", lambda device: True)
    monkeypatch.setattr(ops, "argmax", topk.argmax)
    monkeypatch.setattr(ops, "best", topk.topk)
    served = engine(folder, tree_size, num_blocks=24)
    runner = served.runner
    assert isinstance(runner, Runner)
    runner.graphs = StepGraphs(runner)
    assert run(served, jobs, rate=0.4) == wanted
    assert runner.graphs._graphs


def test_padding() -> None:
    assert [padded_rows(n, 256) for n in (1, 3, 5, 33, 200)] == [1, 3, 6, 40, 256]
    assert padded_rows(5, 5) == 5
    assert padded_rows(300, 512) == 320
