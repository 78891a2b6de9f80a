"""The planner on machines whose steps take something else than start-up measured."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from manyheads.speculation.costs import CostTable
from manyheads.speculation.draft import NO_DRAFT, Draft
from manyheads.speculation.drafter import DEFAULT_ACCEPTANCE
from manyheads.speculation.planner import Planner

ROWS = (1, 2, 4, 8, 16)
MEASURED = (1.25, 2, 3, 4, 8, 16, 32, 64)
"""Nodes a row."""
HEALED = 200
"""Steps after which a wrong start does not matter any more."""


class Machine:
    """Steps take `fixed` and `per_token` for each token, and `drafter` if they draft.

    Args:
        wrong: what start-up measures of steps of so many nodes a row, as a multiple of what they take.
        noise: what a step takes, as a multiple.
    """

    def __init__(
        self,
        fixed: float,
        per_token: float,
        drafter: float,
        wrong: Callable[[float], float] = lambda nodes: 1.0,
        noise: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.fixed, self.per_token, self.drafter, self.noise = fixed, per_token, drafter, noise
        self.planner = Planner(DEFAULT_ACCEPTANCE)
        costs = CostTable()
        for rows in ROWS:
            drafts = [draft for draft in self.planner.drafts(rows) if draft.nodes in MEASURED]
            costs.plain[rows] = self.seconds(rows, NO_DRAFT) * wrong(1)
            costs.trees[rows] = {d.num_tokens(rows): self.seconds(rows, d) * wrong(d.nodes) for d in drafts}
        self.planner.measured(costs)
        self.has_candidates = False

    def seconds(self, rows: int, draft: Draft) -> float:
        """What a step takes."""
        return self.fixed + self.per_token * draft.num_tokens(rows) + self.drafter * draft.propose

    def run(self, rows: int, steps: int) -> tuple[float, list[float]]:
        """Tokens a second over so many steps, noise left out, and the nodes of each."""
        gained = seconds = 0.0
        nodes = []
        for _ in range(steps):
            draft = self.planner.choose(rows)
            gained += rows * (self.planner.expected_tokens(draft, rows) if self.has_candidates else 1.0)
            seconds += self.seconds(rows, draft)
            nodes.append(draft.nodes)
            self.has_candidates = draft.propose
            self.planner.observe_cost(rows, draft, self.seconds(rows, draft) * self.noise())
        return gained / seconds, nodes

    def best(self, rows: int) -> float:
        """Tokens a second of the draft that a planner with the right costs chooses."""
        right = Machine(self.fixed, self.per_token, self.drafter)
        draft = right.planner.choose(rows)
        return rows * right.planner.expected_tokens(draft, rows) / self.seconds(rows, draft)


MACHINES = {"cpu": (3.2, 0.2, 0.6), "dear": (1.0, 0.1, 0.0), "flat": (1.0, 0.001, 0.1), "plain": (0.1, 1.0, 0.0)}
WRONG: dict[str, Callable[[float], bool]] = {
    "plain": lambda nodes: nodes == 1,
    "trees": lambda nodes: nodes > 1,
    "narrow trees": lambda nodes: 1 < nodes <= 8,
    "wide trees": lambda nodes: nodes > 4,
    "all": lambda nodes: True,
}


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("times", [40, 1 / 40, 4, 1 / 4])
@pytest.mark.parametrize("which", WRONG)
@pytest.mark.parametrize("machine", MACHINES)
def test_a_wrong_start_is_healed(machine: str, which: str, times: float, rows: int) -> None:
    made = Machine(*MACHINES[machine], wrong=lambda nodes: times if WRONG[which](nodes) else 1.0)
    made.run(rows, HEALED)
    assert made.run(rows, 400)[0] > 0.92 * made.best(rows)


@pytest.mark.parametrize("seed", range(12))
def test_any_sizes_may_be_wrong(seed: int) -> None:
    """Each size by another factor between a fortieth and forty."""
    factors = random.Random(seed)
    off = {nodes: 40 ** factors.uniform(-1, 1) for nodes in (1, *MEASURED)}
    for machine in MACHINES.values():
        made = Machine(*machine, wrong=lambda nodes: off[nodes])
        made.run(1, HEALED)
        assert made.run(1, 400)[0] > 0.92 * made.best(1)


def test_trees_that_were_disturbed_while_they_were_measured_are_tried() -> None:
    """A machine that does other work: plain steps were measured between it, the longer ones with trees not. While
    plain steps run, nothing tells what trees take, unless they are tried."""
    made = Machine(3.2, 0.2, 0.6, wrong=lambda nodes: 4.0 if nodes > 1 else 1.0)
    assert made.planner.choose(1) is NO_DRAFT
    _, nodes = made.run(1, 1816)
    assert sum(size > 1 for size in nodes[:HEALED]) > HEALED / 2
    assert sum(size > 1 for size in nodes) > 1600


def test_plain_steps_that_were_measured_too_dear_are_tried() -> None:
    made = Machine(0.1, 1.0, 0.0, wrong=lambda nodes: 40.0 if nodes == 1 else 1.0)
    assert made.planner.choose(1).propose
    made.run(1, HEALED)
    _, nodes = made.run(1, 1000)
    assert sum(size == 1 for size in nodes) > 980


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("machine", MACHINES)
def test_trials_cost_little(machine: str, rows: int) -> None:
    """Where everything was known from the start, they take at most 2 % of the tokens a second, and are a few percent of
    the steps: the more, the less they lose."""
    made = Machine(*MACHINES[machine])
    made.run(rows, HEALED)
    rate, nodes = made.run(rows, 3000)
    assert rate > 0.98 * made.best(rows)
    if machine != "plain":
        chosen = max(set(nodes), key=nodes.count)
        assert 10 < sum((size == 1) != (chosen == 1) for size in nodes) < 0.05 * len(nodes)


def test_a_machine_that_becomes_busy_leaves_the_choice_alone() -> None:
    """All steps take four times as long from one step to the next, and later as long as before."""
    made = Machine(3.2, 0.2, 0.6)
    for times in (1.0, 4.0, 1.0, 0.25):
        made.noise = lambda times=times: times  # type: ignore[misc]
        made.run(1, 100)
        assert made.run(1, 300)[0] > 0.95 * made.best(1)


@pytest.mark.parametrize("seed", range(6))
def test_trees_come_back_on_a_machine_that_others_disturb(seed: int) -> None:
    """Its speed changes by up to four times every few steps, and a tenth of them take three times as long as that."""
    noise = random.Random(seed)
    speed = [1.0]

    def disturbed() -> float:
        if noise.random() < 0.05:
            speed[0] = noise.choice((1.0, 1.0, 2.0, 4.0))
        return speed[0] * noise.uniform(0.8, 1.3) * (3.0 if noise.random() < 0.1 else 1.0)

    made = Machine(3.2, 0.2, 0.6, wrong=lambda nodes: 4.0 if nodes > 1 else 1.0, noise=disturbed)
    made.run(1, HEALED)
    rate, nodes = made.run(1, 3000)
    assert rate > 0.75 * made.best(1)
    assert sum(size > 1 for size in nodes) > 0.5 * len(nodes)


def test_what_is_tried_is_decided_by_the_steps_alone() -> None:
    def nodes() -> list[float]:
        noise = random.Random(5)
        return Machine(3.2, 0.2, 0.6, noise=lambda: noise.choice((1.0, 1.0, 1.1, 3.0))).run(4, 1000)[1]

    assert nodes() == nodes()
    assert len(set(nodes())) > 2


def test_steps_with_prompts_try_nothing() -> None:
    made = Machine(3.2, 0.2, 0.6)
    chosen = made.planner.choose(1, prompt_tokens=64)
    for _ in range(1000):
        made.run(1, 1)
        assert made.planner.choose(1, prompt_tokens=64).propose == chosen.propose


def test_a_set_size_leaves_nothing_to_try() -> None:
    planner = Planner(DEFAULT_ACCEPTANCE, tree_size=8)
    planner.measured(CostTable(plain={1: 1.0}, trees={1: {2: 1.0, 64: 9.0}}))
    for _ in range(1000):
        draft = planner.choose(1)
        assert draft.nodes == 8
        planner.observe_cost(1, draft, 1.0)
