"""What steps cost, on a machine that does other work, too."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from manyheads.engine import warmup
from manyheads.engine.step import StepPlan
from manyheads.speculation.planner import DEFAULT_ACCEPTANCE, CostTable, Planner


class Clock:
    """Steps take 1 ms and 0.1 ms a token; each of the disturbed ones takes longer than the one before."""

    def __init__(self, disturbed: int, seconds: float = 1e-3) -> None:
        self.now, self.seconds = 0.0, seconds
        self.delays = itertools.chain((0.002 * (n + 1) for n in range(disturbed)), itertools.repeat(0.0))

    def launch(self, plan: StepPlan) -> Any:
        tokens = plan.draft.num_tokens(len(plan.decoding))
        self.now += self.seconds + 1e-4 * tokens + next(self.delays)
        return SimpleNamespace(read=lambda: None)


def measure(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> CostTable:
    monkeypatch.setattr(warmup.time, "perf_counter", lambda: clock.now)
    lengths = torch.zeros(4, dtype=torch.int32)
    state = SimpleNamespace(admit=lambda requests: None, cached_len=lengths, block_table=lengths.clone())
    runner: Any = SimpleNamespace(
        launch=clock.launch, overlaps=False, graphs=None, device=torch.device("cpu"), block_size=16, state=state
    )
    return warmup.measure_costs(runner, Planner(DEFAULT_ACCEPTANCE), 4, 1024, lambda text: None)


@pytest.mark.parametrize("disturbed", [0, 10, 40])
def test_what_other_work_delays_is_measured_again(disturbed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(disturbed)
    costs = measure(clock, monkeypatch)
    for rows in (1, 2, 4):
        assert costs.plain[rows] == pytest.approx(1e-3 + 1e-4 * rows)
        assert costs.trees[rows] == {n: pytest.approx(1e-3 + 1e-4 * n) for n in costs.trees[rows]}
    assert clock.now < (3 + 3 * warmup.MAX_SECONDS if disturbed else 3)


def test_slow_steps_are_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start-up does not take minutes where a step takes half a second."""
    clock = Clock(0, seconds=0.5)
    costs = measure(clock, monkeypatch)
    assert costs.plain[4] == pytest.approx(0.5 + 4e-4)
    kinds = sum(1 + len(trees) for trees in costs.trees.values())
    assert clock.now == pytest.approx(2 * 0.5 * kinds, rel=0.05)
