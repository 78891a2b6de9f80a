"""The number of threads of a step, on machines with a clock of their own."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from manyheads import EngineConfig, SamplingParams
from manyheads.engine import threads as module
from manyheads.engine.build import build_engine
from manyheads.engine.threads import MOST_WAIT, OtherProcesses, Setting, Threads
from manyheads.request import EngineRequest
from tests.tiny import VOCAB

Cost = Callable[[Setting, int], float]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_COUNT", module._Count())  # engines of other tests may be there yet
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Machine:
    """Steps take what `cost` says of their setting and tokens; other processes take `load` cores."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: Cost, most: int = 2, load: float = 0.0) -> None:
        self.now, self.load, self.cost = 0.0, load, cost
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        self.threads = Threads(most, lambda: self.load)
        self.current = Setting(most)
        apply = self.threads._apply

        def watch(setting: Setting) -> None:
            self.current = setting
            apply(setting)

        monkeypatch.setattr(self.threads, "_apply", watch)

    def run(self, steps: int, tokens: int = 8) -> list[Setting]:
        """The settings of so many steps."""
        seen = []
        for _ in range(steps):
            with self.threads.step(tokens):
                self.now += self.cost(self.current, tokens)
            seen.append(self.current)
        return seen


def alone(setting: Setting, tokens: int) -> float:
    """Nobody else is there: spinning threads meet at once."""
    return (0.004 + tokens * 0.0002) / setting.threads + (0 if setting.spins or setting.threads == 1 else 0.002)


def beside_others(setting: Setting, tokens: int) -> float:
    """Spinning threads wait for one that was put aside."""
    return 0.4 if setting.spins else alone(setting, tokens)


def test_alone_threads_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, alone)
    assert machine.run(1) == [Setting(2)]  # at first they block, whoever may be there
    machine.run(200)
    assert machine.threads.used(8) == Setting(2, True)


def test_beside_others_threads_never_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, beside_others, load=1.0)
    assert not any(setting.spins for setting in machine.run(3000))


def test_threads_that_spin_stop_at_once_when_others_come(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, alone)
    machine.run(200)
    machine.load, machine.cost = 1.0, beside_others
    assert not any(setting.spins for setting in machine.run(500))
    machine.load, machine.cost = 0.0, alone
    machine.run(500)
    assert machine.threads.used(8) == Setting(2, True)


@pytest.mark.parametrize("best", [Setting(1), Setting(3), Setting(6)], ids=str)
def test_the_fastest_number_is_found(best: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """In spite of steps that other work makes longer."""
    noise = random.Random(1)

    def cost(setting: Setting, tokens: int) -> float:
        far = max(setting.threads / best.threads, best.threads / setting.threads)
        return 0.005 * far * noise.choice((1.0, 1.0, 1.0, 1.1, 1.2, 4.0))

    machine = Machine(monkeypatch, cost, most=6, load=2.0)
    machine.run(1000)
    assert machine.threads.used(8) == best


def test_many_tokens_may_have_other_threads_than_few(monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(setting: Setting, tokens: int) -> float:
        return 0.001 * setting.threads if tokens < 16 else 0.1 / setting.threads

    machine = Machine(monkeypatch, cost, load=1.0)
    for _ in range(400):
        machine.run(1, tokens=5)
        machine.run(1, tokens=600)
    assert machine.threads.used(5).threads == 1
    assert machine.threads.used(600).threads == 2


def test_trials_become_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda setting, tokens: 0.005 * setting.threads, load=1.0)
    machine.run(6 * MOST_WAIT)
    seen = machine.run(10 * MOST_WAIT)
    assert 0 < seen.count(Setting(2)) < 0.01 * len(seen)


def test_a_trial_that_hurts_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda setting, tokens: 0.5 if setting.threads == 1 else 0.005, load=1.0)
    seen = machine.run(10)
    assert seen.count(Setting(1)) == 1


def test_other_load_begins_trials_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda setting, tokens: 0.005 * setting.threads, load=1.0)
    machine.run(6 * MOST_WAIT)
    assert machine.threads.used(8) == Setting(1)
    machine.load, machine.cost = 4.0, lambda setting, tokens: 0.005 / setting.threads
    machine.run(60)
    assert machine.threads.used(8) == Setting(2)


def test_torch_computes_with_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda setting, tokens: 0.005 * torch.get_num_threads(), load=1.0)
    machine.run(100)
    assert torch.get_num_threads() == 1


def test_nothing_is_left_behind() -> None:
    module._BLOCKING.end()  # of engines of other tests
    before, given = threading.active_count(), torch.get_num_threads()
    made = Threads(2)
    assert threading.active_count() == before + 1  # it keeps threads from spinning
    assert torch.get_num_threads() == 2
    made._apply(Setting(1))
    del made
    assert threading.active_count() == before
    assert torch.get_num_threads() == given


def test_others_are_those_that_are_not_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cores with 100 ticks a second; others' 30 ticks of user time and 20 of the system's in a second."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.time, "process_time", lambda: clock[0] * 0.5)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(module.os, "sysconf", lambda name: 100)

    def stat(path: Path) -> str:
        ticks = int(clock[0] * 100)
        mine, others, system = ticks // 2, ticks * 30 // 100, ticks * 20 // 100
        return f"cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 {mine} 0 0 7 0 0 0 0 0 0\ncpu1 {others} 0 {system} 9 0 0 0 0 0 0\n"

    monkeypatch.setattr(module.Path, "read_text", stat)
    monkeypatch.setattr(module.Path, "exists", lambda path: True)
    others = OtherProcesses()
    assert others() == 0.0
    clock[0] = 1.0
    assert others() == pytest.approx(0.5)


def test_text_does_not_depend_on_threads(folder: Path, reference: LlamaForCausalLM) -> None:
    """They change from step to step here; the planner learns from those that are computed as most are."""
    numbers = random.Random(3)
    prompts = [[numbers.randrange(VOCAB) for _ in range(numbers.randint(1, 40))] for _ in range(12)]
    settings = {"model": str(folder), "dtype": "float32", "max_num_seqs": 6, "tree_size": 4}
    texts = []
    for num_threads in (1, 2, None):
        torch.set_num_threads(2)
        engine = build_engine(EngineConfig(num_threads=num_threads, **settings))
        assert (engine.runner.threads is None) == (num_threads is not None)
        for i, prompt in enumerate(prompts):
            params = SamplingParams(temperature=0.0, max_tokens=60)
            engine.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
        tokens: dict[str, list[int]] = {}
        while engine.has_work():
            for delta in engine.step():
                tokens.setdefault(delta.request_id, []).extend(delta.new_token_ids)
        texts.append(tokens)
    assert texts[0] == texts[1] == texts[2]


def test_steps_of_trials_say_nothing_of_costs(folder: Path, reference: LlamaForCausalLM) -> None:
    torch.set_num_threads(2)
    engine = build_engine(EngineConfig(model=str(folder), dtype="float32", max_num_seqs=1))
    assert engine.runner.threads is not None
    trials: list[bool] = []
    costs: list[float] = []
    launch = engine.runner.launch

    def watched(plan: Any, *more: Any) -> Any:
        step = launch(plan, *more)
        if not plan.chunks:
            trials.append(engine.runner.threads.is_trial)
        return step

    engine.runner.launch = watched  # type: ignore[method-assign]
    engine.planner.observe_cost = lambda rows, draft, seconds, prompts: None if prompts else costs.append(seconds)  # type: ignore[method-assign]
    params = SamplingParams(temperature=0.0, max_tokens=120)
    engine.add_request(EngineRequest(request_id="0", prompt_token_ids=[1], params=params))
    while engine.has_work():
        engine.step()
    assert any(trials)
    assert len(costs) == trials.count(False)


def test_an_engine_has_the_threads_that_there_are(folder: Path, reference: LlamaForCausalLM) -> None:
    """Whatever an engine before it computes with just now; but what somebody else has set holds."""
    torch.set_num_threads(4)
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32", num_blocks=40, block_size=4)

    def built() -> Threads:
        made = build_engine(config).runner.threads
        assert made is not None
        return made

    def most(threads: Threads) -> int:
        return threads._settings[-1].threads

    first = built()
    assert most(first) == 4
    first._apply(Setting(1))
    second = built()
    assert most(second) == 4
    second._apply(Setting(2))
    torch.set_num_threads(3)
    assert most(built()) == 3
