"""The runner with drafters of other kinds than heads, and with requests that hold no row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manyheads import SamplingParams
from manyheads.batch import RowState
from manyheads.engine.engine import Engine
from manyheads.engine.page_manager import PageTable
from manyheads.engine.runner import Runner
from manyheads.engine.step import Chunk, Request, StepPlan
from manyheads.kv_cache import KVCache
from manyheads.models.llama import Llama
from manyheads.speculation.draft import NO_DRAFT
from manyheads.speculation.drafter import DrafterShape, Kept
from manyheads.speculation.tree import Tree
from tests.engine.test_exactness import engine, prompts, run
from tests.engine.test_graphs import record
from tests.tiny import VOCAB
from tests.trees import medusa

KV_LAYERS = 3


class Counting:
    """Guesses that numbers go on counting, two by two: after 5 comes 6 or 7, and after that 7 or 8. It keeps, for each
    row, how many tokens its text has, and layers of K/V that it does not use."""

    name = "counting"
    passes_per_depth = 0
    offered = None
    prior_holds = False
    prior = [[0.4, 0.3]] * 2

    def __init__(self) -> None:
        self.shape = DrafterShape(
            max_depth=2, num_candidates=4, kv_layers=KV_LAYERS, row_state={"length": ((), torch.int64)}
        )

    def build(self, model: Llama, dtype: torch.dtype, device: torch.device, quantization: str | None) -> Counting:
        return self

    def columns(self, tree: Tree) -> list[int]:
        return medusa(2, 2).columns(tree)

    def follow(self, candidates: list[int], tokens: list[int]) -> Iterator[list[int]]:
        return medusa(2, 2).follow(candidates, tokens)

    def attach(self, cache: KVCache) -> None:
        pass

    def admit(self, state: RowState, row: int, tokens: list[int]) -> None:
        state.drafter["length"][row] = len(tokens)

    def observe(self, state: RowState, kept: Kept) -> None:
        state.drafter["length"].index_add_(0, kept.index, kept.gained[:, 0])

    def propose(self, state: RowState, kept: Kept, depth: int, nodes: float) -> tuple[Tensor, Tensor]:
        last = kept.tokens.gather(1, kept.gained - 1)
        candidates = (last + torch.tensor([1, 2, 2, 3])) % VOCAB
        return candidates, torch.full(candidates.shape, 0.4)

    def memory_bytes(self) -> int:
        return 0


def counting(folder: Path, monkeypatch: pytest.MonkeyPatch, tree_size: int) -> Engine:
    monkeypatch.setattr("manyheads.engine.blueprint.find_drafter", lambda *args: Counting())
    return engine(folder, tree_size, num_blocks=24)


def runner_of(served: Engine) -> Runner:
    assert isinstance(served.runner, Runner)
    return served.runner


@pytest.mark.usefixtures("reference")
def test_a_drafters_layers_stand_behind_the_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, served = runner_of(engine(folder, 4, num_blocks=24)), counting(folder, monkeypatch, 4)
    runner = runner_of(served)
    layers = plain.cache.data.shape[0]
    assert layers == runner.model.config.num_layers
    assert runner.cache.data.shape == (layers + KV_LAYERS, *plain.cache.data.shape[1:])
    assert runner.cache.nbytes == plain.cache.nbytes * (layers + KV_LAYERS) // layers
    assert served.ready.memory.kv_cache == runner.cache.nbytes
    assert runner.state.drafter["length"].shape == (runner.state.num_rows + 1,)
    assert runner.state.candidates.shape == (runner.state.num_rows + 1, 4)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
def test_text_is_that_of_plain_decoding(folder: Path, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is guessed, and whatever layers lie behind the model's, in few pages."""
    jobs = [
        (prompt, SamplingParams(max_tokens=10 + i, seed=i, temperature=i % 2, logprobs=None if i % 3 else 1))
        for i, prompt in enumerate(prompts(12, shared=9))
    ]
    wanted = run(engine(folder, 1, num_blocks=24), jobs, rate=0.4)
    served = counting(folder, monkeypatch, 6)
    if recorded:
        record(served)
    assert run(served, jobs, rate=0.4) == wanted
    stats = served.stats()
    assert stats.drafted_tokens > 0
    assert stats.preemptions > 0


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("tree_size", [1, 6])
@pytest.mark.parametrize("mode", ["in turn", "overlapping", "recorded"])
def test_a_drafter_sees_every_token(folder: Path, tree_size: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of chunks and of trees, those that come after the end too; and of roots alone, after which nothing is guessed."""
    monkeypatch.setattr(Runner, "overlaps", mode == "overlapping")
    served = counting(folder, monkeypatch, tree_size)
    if mode == "recorded":
        record(served)
    state = runner_of(served).state
    for prompt in prompts(4):
        run(served, [(prompt, SamplingParams(max_tokens=15, temperature=0.0))])
        # one row runs at a time, the first one; the device may be ahead of what is asked for
        past = int(state.drafter["length"][0]) - len(prompt) - 15
        assert past == int(state.cached_len[0]) + 1 - len(prompt) - 15
        assert 0 <= past <= (2 if tree_size > 1 else 0) + 3 * (mode == "overlapping")


def snapshot(runner: Runner) -> list[Tensor]:
    state = runner.state
    kept = (state.cached_len, state.drafts, state.chances, state.page_table, state.ints, state.floats)
    return [tensor.clone() for tensor in (*kept, runner.cache.data)]


def request(name: str, row: int | None, num_synced: int = 0) -> Request:
    """Of 4 tokens, 3 of them cached, that has its pages."""
    return Request(
        request_id=name,
        params=SamplingParams(temperature=0.0),
        tokens=[1, 2, 3, 4],
        prompt_len=3,
        max_len=20,
        stop_ids=frozenset(),
        seed=0,
        table=PageTable(pages=[1, 2, 3], num_synced=num_synced),
        held_row=row,
        cached_len=3,
    )


def test_a_request_without_a_row_says_so() -> None:
    lost = request("lost", None)
    with pytest.raises(RuntimeError, match="request lost is to run, but holds no row"):
        _ = lost.row
    assert request("first", 0).row == 0


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("synced", [0, 3])
@pytest.mark.parametrize("part", ["admitted", "chunks", "decoding", "beside another"])
def test_nothing_is_written_for_a_request_without_a_row(folder: Path, part: str, synced: int, recorded: bool) -> None:
    """It was row 0 once, in silence."""
    served = engine(folder, 1)
    if recorded:
        record(served)
    runner = runner_of(served)
    lost = request("lost", None, synced)
    parts = {
        "admitted": StepPlan([Chunk(lost, 1, True)], [], NO_DRAFT, [lost]),
        "chunks": StepPlan([Chunk(lost, 1, True)], [], NO_DRAFT),
        "decoding": StepPlan([], [lost], NO_DRAFT),
        "beside another": StepPlan([], [request("other", 1, synced), lost], NO_DRAFT),
    }
    before = snapshot(runner)
    with pytest.raises(RuntimeError, match="request lost is to run, but holds no row"):
        runner.launch(parts[part])
    if recorded:  # what a step is recorded with is the dummy row's
        before[-1][:, :, 0] = runner.cache.data[:, :, 0]
        for old, new in zip(before[:-1], snapshot(runner)[:-1], strict=True):
            old[-1] = new[-1]
    assert all(torch.equal(old, new) for old, new in zip(before, snapshot(runner), strict=True))
