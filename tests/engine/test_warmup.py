"""What steps cost, on a machine that does other work, too."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from manyheads.batch import RowState
from manyheads.engine import warmup
from manyheads.engine.state import admit, clear, rewind, sync_pages
from manyheads.engine.step import Request, StepPlan, StepResult
from manyheads.speculation.costs import CostTable
from manyheads.speculation.draft import NO_DRAFT, Draft
from manyheads.speculation.drafter import DEFAULT_ACCEPTANCE
from manyheads.speculation.planner import Planner
from manyheads.speculation.tree import Tree


@pytest.fixture(autouse=True)
def little_patience() -> None:
    """Here the clock is no real one, and patience costs nothing."""


class Clock:
    """Steps take 1 ms and 0.1 ms a token, and so much for each pass of the drafter and for each cached token; each of
    the disturbed ones takes longer than the one before."""

    def __init__(self, disturbed: int, seconds: float = 1e-3, one_pass: float = 0.0, cached: float = 0.0) -> None:
        self.now, self.seconds, self.one_pass, self.cached = 0.0, seconds, one_pass, cached
        self.delays = itertools.chain((0.002 * (n + 1) for n in range(disturbed)), itertools.repeat(0.0))

    def launch(self, plan: StepPlan) -> Any:
        tokens = plan.num_inflight
        cached = self.cached * sum(request.cached_len for request in plan.decoding)
        self.now += self.seconds + 1e-4 * tokens + self.one_pass * plan.draft.passes + cached + next(self.delays)
        return SimpleNamespace(read=lambda: StepResult(rows=[], hits=[], trials=[]))


def fake_runner(clock: Clock, monkeypatch: pytest.MonkeyPatch, max_len: int = 1024) -> Any:
    """What takes as long as the clock says."""
    monkeypatch.setattr(warmup.time, "perf_counter", lambda: clock.now)
    device = torch.device("cpu")
    state = RowState(4, max_len, 16, 40, 100, device)

    def put(requests: list[Request]) -> None:
        admit(state, None, requests)
        sync_pages(state, requests)

    return SimpleNamespace(
        launch=clock.launch,
        overlaps=False,
        recorded=None,
        device=device,
        model=SimpleNamespace(adapters=None),
        state=state,
        cache=SimpleNamespace(num_text_pages=4 * max_len // 16),
        put=put,
        rewind=partial(rewind, state),
        clear=partial(clear, state),
    )


def measure(clock: Clock, monkeypatch: pytest.MonkeyPatch, planner: Planner | None = None) -> CostTable:
    """Let the planner learn what its steps cost on rows of a state that is left as it was."""
    runner = fake_runner(clock, monkeypatch)
    state = runner.state
    planner = planner or Planner(DEFAULT_ACCEPTANCE)
    assert planner.choose(1) is NO_DRAFT  # it does not know yet
    warmup.measure_costs(runner, planner, lambda text: None)
    assert not state.cached_len.any()
    assert not state.page_table.any()
    assert planner.costs is not None
    return planner.costs.guess


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
    monkeypatch.setattr(warmup, "PROMPTS", ())
    costs = measure(clock, monkeypatch)
    assert costs.plain[4] == pytest.approx(0.5 + 4e-4)
    kinds = sum(1 + len(trees) for trees in costs.trees.values()) + 2  # and behind a short text and a long one
    assert clock.now == pytest.approx(2 * 0.5 * kinds, rel=0.05)


def test_prompts_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = measure(Clock(0), monkeypatch)
    assert max(costs.prompts) == 512  # rows have room for no longer prompt
    assert costs.prompts == {n: pytest.approx(1e-3 + 1e-4 * n) for n in costs.prompts}
    assert costs.prompt_cost(30, 700) == pytest.approx(1e-4 * 700)


@pytest.mark.parametrize("max_len", [256, 1024, 4096])
def test_what_caches_take_to_read_is_measured(max_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where texts can be much longer than those that steps are measured with."""
    runner, planner = fake_runner(Clock(0, cached=1e-6), monkeypatch, max_len), Planner(DEFAULT_ACCEPTANCE)
    warmup.measure_costs(runner, planner, lambda text: None)
    assert planner.costs is not None
    costs = planner.costs.guess
    assert costs.context == min(warmup.CONTEXT, max_len // 2)
    assert costs.cached == pytest.approx(0.0 if max_len == 256 else 1e-6, rel=1e-3)
    if max_len == 4096:
        planner.rows_are([0] * 4, 4 * 3000)
        draft = planner.best(4)
        tokens = draft.num_tokens(4)
        assert planner.costs.seconds(4, draft.kind) == pytest.approx(1e-3 + 1e-4 * tokens + 1e-6 * 4 * 3000)


@pytest.mark.parametrize("size", [None, 1, 5])
def test_what_is_not_chosen_is_measured_too(size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without a drafter and a tree of a set size need to know what their steps cost, for the prompts beside."""
    clock = Clock(0)
    planner = Planner([] if size is None else DEFAULT_ACCEPTANCE, tree_size=size)
    runner = fake_runner(clock, monkeypatch)
    warmup.measure_costs(runner, planner, lambda text: None)
    assert planner.costs is not None
    draft = planner.best(4)
    assert draft.nodes == (size or 1)
    tokens = draft.num_tokens(4)
    assert planner.costs.seconds(4, draft.kind) == pytest.approx(1e-3 + 1e-4 * tokens)
    assert planner.costs.seconds(4, draft.kind, 100) == pytest.approx(1e-3 + 1e-4 * (tokens + 100))


@pytest.mark.parametrize("disturbed", [0, 10])
@pytest.mark.parametrize("per_depth", [1, 2])
@pytest.mark.parametrize("one_pass", [2e-4, 5e-3])
def test_passes_are_told_from_tokens(
    one_pass: float, per_depth: int, disturbed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = Planner(DEFAULT_ACCEPTANCE, passes_per_depth=per_depth)
    monkeypatch.setattr(warmup, "PROMPTS", ())
    costs = measure(Clock(disturbed, one_pass=one_pass), monkeypatch, planner)
    for rows in (1, 2, 4):
        assert costs.plain[rows] == pytest.approx(1e-3 + 1e-4 * rows)
        assert costs.passes[rows] == pytest.approx(one_pass)
        assert costs.trees[rows] == {n: pytest.approx(1e-3 + 1e-4 * n) for n in costs.trees[rows]}
        assert max(costs.trees[rows]) == 64 * rows
        for draft in planner.drafts(rows):
            tokens = max(draft.num_tokens(rows), min(costs.trees[rows]))
            wanted = 1e-3 + 1e-4 * tokens + one_pass * draft.passes
            assert costs.tree_cost(rows, tokens, draft.passes) == pytest.approx(wanted)


@pytest.mark.parametrize("ranks", [[7, 4, 5, 2], [8, 1, 9], [2, 2], [1, 1, 1, 1], [9]], ids=str)
def test_passes_are_told_from_tokens_whatever_the_drafter(ranks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only deep trees have nodes enough for the largest size, smaller ones say what a pass takes."""
    prior = [[0.5 / (rank + 1) for rank in range(count)] for count in ranks]
    planner = Planner(prior, passes_per_depth=1)
    costs = measure(Clock(0, one_pass=2e-3), monkeypatch, planner)
    for draft in planner.drafts(1):
        wanted = 1e-3 + 1e-4 * draft.num_tokens(1) + 2e-3 * draft.passes
        if draft.num_tokens(1) <= max(costs.trees[1]):
            assert costs.tree_cost(1, draft.num_tokens(1), draft.passes) == pytest.approx(wanted)


def test_a_drafter_without_passes_is_charged_none(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = measure(Clock(0), monkeypatch)
    assert not any(costs.passes.values())


def test_a_shallow_step_that_nobody_disturbed_makes_no_other_free() -> None:
    """The deep one of its size was held up; so a pass seems to take longer than a whole step of another size."""
    trees = [((),), ((), (0,)), ((), (0,), (0, 0)), ((), (0,), (1,))]
    deep, shallow, other = (
        Draft(Tree(trees[i]), nodes, passes) for i, nodes, passes in ((2, 3, 4), (3, 3, 1), (1, 2, 3))
    )
    without, one_pass = warmup._apart([deep, other, shallow], [1.0, 0.02, 0.01], 1)
    assert 0 < one_pass < 0.02 / 3
    assert all(seconds > 0 for seconds in without.values())
