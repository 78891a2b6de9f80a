"""Steps by graph without a GPU: a recorded step is a function that is called again and writes into the same tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import LlamaForCausalLM

from manyheads import SamplingParams
from manyheads.engine import decode, state
from manyheads.engine.graphs import ROWS, TREE_ROWS, Recorder, StepGraphs, padded_rows
from manyheads.engine.prompt_graphs import PromptGraphs
from manyheads.engine.runner import Runner
from manyheads.models import ops
from manyheads.speculation.planner import Planner
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


class StandIn(Recorder):
    def __init__(self) -> None:
        self.memory_bytes = 0

    def aside(self) -> contextlib.nullcontext[None]:  # type: ignore[override]
        return contextlib.nullcontext()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        result = function()
        return Recorded(function, result), result


def test_memory_of_graphs_is_what_capturing_took(
    folder: Path, reference: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine(folder, 1).runner
    assert isinstance(runner, Runner)
    looks = iter((1000, 1300, 1300, 1350, 1350, 1400))
    monkeypatch.setattr("manyheads.engine.graphs.taken_bytes", lambda _: next(looks))
    recorder = StandIn()
    graphs = StepGraphs(runner, recorder)
    assert recorder.memory_bytes == 0
    graphs.capture(Planner([[0.5, 0.3]] * 3))
    assert recorder.memory_bytes == 300
    assert len(graphs._graphs) > 4
    graphs._make([(2, 64, 128)])
    assert recorder.memory_bytes == 350
    PromptGraphs(runner, recorder).capture()
    assert recorder.memory_bytes == 400


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
    runner.graphs, runner.prompt_graphs = StepGraphs(runner, StandIn()), PromptGraphs(runner, StandIn())
    assert run(served, jobs, rate=0.4) == wanted
    assert len(runner.graphs._graphs) > 2
    assert len(runner.prompt_graphs._graphs) > 1
    assert served.stats().preemptions > 0


@pytest.mark.skipif(not INTERPRETED, reason="the engine's tests are on the CPU")
@pytest.mark.usefixtures("reference")
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
    runner.graphs, runner.prompt_graphs = StepGraphs(runner, StandIn()), PromptGraphs(runner, StandIn())
    assert run(served, jobs, rate=0.4) == wanted
    assert runner.graphs._graphs


def test_padding() -> None:
    assert [padded_rows(n, 256, ROWS) for n in (1, 3, 5, 33, 200)] == [1, 3, 6, 40, 256]
    assert [padded_rows(n, 256, TREE_ROWS) for n in (1, 3, 5, 33, 200)] == [1, 4, 8, 48, 256]
    assert padded_rows(5, 5, ROWS) == 5
    assert padded_rows(300, 512, ROWS) == 320
