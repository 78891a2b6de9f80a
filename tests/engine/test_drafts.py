"""The planner and the engine together: trees that were given up come back."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from manyheads import EngineConfig, SamplingParams
from manyheads.engine.build import build_engine
from manyheads.engine.step import PendingStep, StepPlan
from manyheads.request import EngineRequest
from manyheads.speculation.costs import CostTable
from manyheads.speculation.draft import NO_DRAFT, Draft
from tests.tiny import VOCAB


def test_a_step_before_the_heads_have_spoken_says_nothing_of_them(
    folder: Path, reference: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside prompts trees do not pay here, so the first trees after one have no candidates yet."""
    monkeypatch.setattr("manyheads.speculation.planner.REGROW_EVERY", 2)  # what was learnt shows at once
    config = EngineConfig(model=str(folder), dtype="float32", num_threads=1, max_num_seqs=8, max_num_batched_tokens=16)
    engine = build_engine(config)
    planner = engine.planner
    planner.measured(CostTable(plain=dict.fromkeys((1, 2, 4, 8), 1.0), trees={r: {r: 1.0} for r in (1, 2, 4, 8)}))
    choose = planner.choose

    def no_trees_beside_prompts(rows: int, prompt_tokens: int = 0) -> Draft:
        return NO_DRAFT if prompt_tokens else choose(rows)

    monkeypatch.setattr(planner, "choose", no_trees_beside_prompts)
    monkeypatch.setattr(planner, "observe_cost", lambda *args: None)
    numbers = random.Random(0)
    for wave in range(3):
        drafted = engine.stats().drafted_tokens
        for i in range(4):
            prompt = [numbers.randrange(VOCAB) for _ in range(20)]
            params = SamplingParams(temperature=0.0, max_tokens=60)
            engine.add_request(EngineRequest(request_id=f"{wave} {i}", prompt_token_ids=prompt, params=params))
        while engine.has_work():
            engine.step()
        assert engine.stats().drafted_tokens - drafted > 2000  # some 30 steps of 250


def test_a_step_takes_as_long_as_its_computing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU computes a step as it is launched; that is the time that costs are learnt from."""
    engine = build_engine(EngineConfig(model=str(folder), dtype="float32", num_threads=1, max_num_seqs=2))
    launch, seen = engine.runner.launch, list[float]()

    def slow(plan: StepPlan, *more: Any) -> PendingStep:
        time.sleep(0.005)
        return launch(plan, *more)

    monkeypatch.setattr(engine.runner, "launch", slow)
    monkeypatch.setattr(engine.planner, "observe_cost", lambda rows, draft, seconds, prompts: seen.append(seconds))
    params = SamplingParams(temperature=0.0, max_tokens=20)
    engine.add_request(EngineRequest(request_id="0", prompt_token_ids=[1, 2, 3], params=params))
    while engine.has_work():
        engine.step()
    assert len(seen) > 3
    assert min(seen) > 0.005
