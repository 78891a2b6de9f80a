"""Recorded steps without a GPU: a recording is a function that is called again and writes into the same tensors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from triton import knobs

from manyheads import SamplingParams
from manyheads.batch import MAX_PADDING
from manyheads.engine.engine import Engine
from manyheads.engine.graphs import Recorded, Recorder
from manyheads.engine.quickest import MOST_ADDED
from manyheads.engine.record_sizes import CHUNKS, ROWS, TREE_ROWS, TREES, fitting, padded_rows, pass_keys
from manyheads.engine.recorded import RecordedSteps, all_steps
from manyheads.engine.runner import Runner
from manyheads.engine.step_run import StepRun
from manyheads.engine.warmup import exercise
from manyheads.kernels import compiling
from manyheads.models.registry import read_config
from manyheads.ops.torch import TorchOps
from manyheads.speculation.draft import SIZES, Draft
from manyheads.speculation.planner import Planner, most_inflight
from manyheads.speculation.tree import Tree
from tests.eagle3 import make_drafter
from tests.engine.test_exactness import engine, prompts, run
from tests.kernels import INTERPRETED
from tests.tiny import VOCAB

T = TypeVar("T")


class Again(Recorded[T]):
    """What a CUDA graph is to `RecordedSteps`."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.function, self.result = function, function()

    def replay(self) -> T:
        for old, new in zip(tensors(self.result), tensors(self.function()), strict=True):
            old.copy_(new)
        return self.result


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
        self._device = torch.device("cpu")
        self.tell = lambda what: None
        self.memory_bytes = 0

    def aside(self) -> contextlib.nullcontext[None]:  # type: ignore[override]
        return contextlib.nullcontext()

    def record(self, function: Callable[[], T]) -> Recorded[T]:
        return Again(function)


def record(served: Engine, ops: TorchOps | None = None) -> RecordedSteps:
    """Let an engine's steps be recorded.

    Args:
        ops: what the step does on the device beside the model; None leaves it as it is.
    """
    runner = served.runner
    assert isinstance(runner, Runner)
    if ops is not None:
        runner.run = StepRun(runner.model, runner.drafter, ops, runner.state, runner.cache)
    runner.recorded = RecordedSteps(runner.run, StandIn())
    # as on a GPU, before the next step writes to the same tensors, which may be read later
    runner._sent = torch.clone  # type: ignore[method-assign,assignment]
    return runner.recorded


def test_memory_of_graphs_is_what_capturing_took(
    folder: Path, reference: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = engine(folder, 1)
    looks = iter((1000, 1300, 1300, 1350, 1350, 1400, 1400, 900))
    monkeypatch.setattr("manyheads.engine.graphs.taken_bytes", lambda _: next(looks))
    recorded = record(served)
    recorder, runner = recorded.recorder, served.runner
    assert isinstance(runner, Runner)
    assert recorder.memory_bytes == runner.graph_bytes == 0
    recorded.record_steps(all_steps(Planner([[0.5, 0.3]] * 3), recorded.run.state.num_rows))
    assert recorder.memory_bytes == 300
    assert len(recorded._steps) > 4
    wide = Draft(Tree(((), *((rank,) for rank in range(63)))), 64)
    recorded._make_steps([(recorded._key(2, wide), wide)])
    assert recorder.memory_bytes == 350
    assert (2, 64, 128, 0) in recorded._steps
    recorded.record_passes(64, 128, {})
    assert recorder.memory_bytes == runner.graph_bytes == 400
    wider = Draft(wide.tree, 48)
    recorded.record_steps([(2, wider)])
    assert recorder.memory_bytes == 400, "another process has ended"


@pytest.mark.parametrize("most", [1, 5, 64, 256, 257, 500])
def test_a_step_is_recorded_for_any_number_of_rows(most: int) -> None:
    planner = Planner([[0.5, 0.3]] * 3)
    wanted = {(rows, draft.nodes) for rows, draft in all_steps(planner, most)}
    for rows in range(1, most + 1):
        assert (padded_rows(rows, most, ROWS), 1) in wanted
        padded = padded_rows(rows, most, TREE_ROWS)
        assert {(padded, draft.nodes) for draft in planner.drafts(padded)} <= wanted


@pytest.mark.parametrize("most", [1, 8, 16, 64, 96, 256])
def test_a_pass_is_recorded_for_whatever_rows_may_bring(most: int) -> None:
    keys = pass_keys(most, 1024, min(64 * most, most_inflight(most)))
    for rows in range(1, most + 1):
        padded = padded_rows(rows, most, TREE_ROWS)
        for draft in Planner([[0.5, 0.3]] * 3).drafts(padded):
            tokens = draft.num_tokens(padded)
            assert (fitting(CHUNKS, 100, 1), fitting(TREES, tokens, padded)) in keys, (rows, draft.nodes)


def test_trees_beside_prompts_are_padded_with_few_tokens() -> None:
    """Where they are so many that each costs arithmetic, and a row has at most four nodes."""
    for rows in TREE_ROWS:
        for nodes in (size for size in SIZES if 1 < size <= 4):
            tokens = int(nodes * rows)
            size = fitting(TREES, tokens, rows)
            assert size is not None
            assert size[0] - tokens <= max(32, tokens // 8), (rows, nodes)


def test_what_recordings_make_of_tokens_stands_in_places_that_they_share(
    folder: Path, reference: LlamaForCausalLM, tmp_path: Path
) -> None:
    """Logits of each step by themselves would take gigabytes."""
    make_drafter(tmp_path / "drafter", read_config(folder))
    served = engine(folder, None, heads=str(tmp_path / "drafter"), max_num_seqs=8)
    recorded = record(served)
    recorded.record_steps(all_steps(served.planner, 8))
    recorded.record_passes(64, 64, {})
    steps, passes = list(recorded._steps.values()), list(recorded._passes.values())
    assert len(steps) > 10 < len(passes)
    made: dict[str, list[Tensor]] = {"logits": [step.half.logits for step in steps]}
    made["last"], made["states"] = ([getattr(step.half.hidden, name) for step in steps] for name in ("last", "states"))
    for known, hidden in (found.recorded.result for found in passes):
        made.setdefault("last of passes", []).append(hidden.last)
        if known is not None:
            made.setdefault("ends", []).append(known.ends)
    assert {
        name: len({tensor.untyped_storage().data_ptr() for tensor in of}) for name, of in made.items()
    } == dict.fromkeys(made, 1)
    assert max(map(len, made["logits"])) * VOCAB * 4 == made["logits"][0].untyped_storage().nbytes()


def test_what_a_pass_is_padded_to(folder: Path) -> None:
    served = engine(folder, 4, max_num_seqs=16, max_num_batched_tokens=64)
    recorded = record(served)
    recorded.record_passes(64, 64, {})
    assert [recorded.padded_pass(*sizes) for sizes in ((20, 0, 0), (33, 9, 3), (64, 64, 16))] == [32, 80, 128]
    assert recorded.padded_pass(65, 64, 16) == 65 + 64, "none is recorded, and nothing padded"


def test_passes_of_other_sizes_give_the_same(folder: Path, reference: LlamaForCausalLM) -> None:
    """A few more tokens may be computed sooner; they are the dummy row's, of chunks if there are some."""
    instead = {32: 48, 48: 96, 64: 64, 128: 192}
    jobs = [(prompt, SamplingParams(temperature=i % 2, seed=i, max_tokens=9)) for i, prompt in enumerate(prompts(12))]
    wanted = run(engine(folder, 4), jobs, rate=0.4)
    served = engine(folder, 4)
    recorded = record(served)
    recorded.record_passes(64, 128, instead)
    assert run(served, jobs, rate=0.4) == wanted
    sizes = {key: found.num_tokens for key, found in recorded._passes.items()}
    assert {sum(tokens for tokens, _ in key): size for key, size in sizes.items()}.items() >= instead.items()
    assert recorded.padded_pass(20, 0, 0) == 48
    of_trees = recorded._passes[(0, 0), (32, 32)].trees
    assert of_trees is not None
    assert len(of_trees.inflight.tokens) == 48


@pytest.mark.parametrize("model", ["plain", "eagle3"])
def test_passes_are_recorded_whatever_a_sequence_may_have(
    folder: Path, reference: LlamaForCausalLM, tmp_path: Path, model: str
) -> None:
    """A pass of the largest size belongs to the dummy row as it is recorded, which then brings more than any row."""
    most = max(CHUNKS[-1][0], TREES[-1][0]) + MOST_ADDED
    assert most <= MAX_PADDING
    settings: dict[str, Any] = {"max_model_len": 64}
    if model == "eagle3":
        make_drafter(tmp_path / "drafter", read_config(folder))
        settings["heads"] = str(tmp_path / "drafter")
    jobs = [(prompt, SamplingParams(temperature=0.0, max_tokens=9)) for prompt in prompts(6)]
    wanted = run(engine(folder, 4, **settings), jobs)
    served = engine(folder, 4, **settings)
    recorded = record(served)
    # with few rows: all tokens are the last one's, and torch would fill up the others to as many
    recorded._make_passes([((CHUNKS[-1][0], 2), (TREES[-1][0], 2))], {2048: 2048 + MOST_ADDED})
    recorded.record_passes(8, 128, {})
    assert recorded.run.state.page_table.shape[1] * recorded.run.state.page_size >= most
    assert run(served, jobs) == wanted


def test_what_was_run_for_its_kernels_leaves_nothing_behind(folder: Path, reference: LlamaForCausalLM) -> None:
    """Before an engine is ready, steps of all kinds run over pages that nobody has yet; texts are as without."""
    jobs = [(prompt, SamplingParams(temperature=0.0, max_tokens=9)) for prompt in prompts(6)]
    wanted = run(engine(folder, 4), jobs)
    served = engine(folder, 4)
    recorded = record(served)
    recorded.record_passes(8, 128, {})
    runner = served.runner
    assert isinstance(runner, Runner)
    exercise(runner, served.planner, 8)
    assert not runner.state.cached_len.any()
    assert not runner.state.page_table.any()
    assert run(served, jobs) == wanted


def test_what_is_compiled_or_captured_while_serving_is_counted(
    folder: Path, reference: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    served = engine(folder, 1)
    runner = served.runner
    assert isinstance(runner, Runner)
    recorded = record(served)
    runner.watch(served._counts.compiled)
    recorded.recorder.tell("graph")
    compiling.watch(served._counts.compiled)
    try:
        knobs.runtime.jit_post_compile_hook(fn=SimpleNamespace(name="some_kernel"), compile={}, already_compiled=False)  # type: ignore[misc]
    finally:
        knobs.runtime.reset()
    assert served.stats().num_compiled == 2
    assert "compiled or captured while serving: kernel some_kernel" in capsys.readouterr().err


def test_drafts_of_other_depths_are_other_steps(folder: Path, reference: LlamaForCausalLM) -> None:
    """Where a drafter runs passes for each depth, so many of them are in the recording."""
    recorded = record(engine(folder, 1))
    planner = Planner([[0.5, 0.3]] * 3, passes_per_depth=1)
    recorded.record_steps(all_steps(planner, recorded.run.state.num_rows))
    for rows in (1, 2, 4):
        drafts = planner.drafts(rows)
        assert {draft.passes for draft in drafts} == {1, 2, 3}
        for draft in drafts:
            assert recorded._steps[recorded._key(rows, draft)].rows.depth == draft.tree.max_depth
    draft = planner.drafts(2)[-1]
    deeper = dataclasses.replace(draft, passes=draft.passes + 1)
    recorded.record_steps([(2, deeper)])
    first, second = (recorded._steps[recorded._key(2, each)] for each in (draft, deeper))
    assert first.half is second.half, "passes come in the second half"
    assert first.finish is not second.finish
    state, rows = recorded.run.state, first.rows
    rows.index.copy_(torch.tensor([0, 1]))
    state.cached_len[:2] = 7
    recorded.record_steps([(2, dataclasses.replace(draft, passes=draft.passes + 2))])
    assert state.cached_len.tolist()[:2] == [7, 7], "what is recorded while serving leaves running rows alone"


@pytest.mark.parametrize(
    ("tree_size", "drafter"), [(1, "medusa"), (2, "medusa"), (4, "medusa"), (16, "medusa"), (4, "ngram")]
)
def test_text_is_that_of_steps_without_graphs(
    folder: Path, reference: LlamaForCausalLM, tree_size: int, drafter: str
) -> None:
    """Greedy, sampled, with penalties, and rows that no graph serves; few pages, and rows that come and go. Trees may
    have fewer nodes than the paths that a step was recorded with have room for."""
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
    wanted = run(engine(folder, tree_size, num_blocks=24, drafter=drafter), jobs, rate=0.4)
    served = engine(folder, tree_size, num_blocks=24, drafter=drafter)
    recorded = record(served)
    recorded.record_passes(8, 128, {})
    assert run(served, jobs, rate=0.4) == wanted
    assert len(recorded._steps) > 2
    assert len(recorded._passes) > 1
    assert served.stats().preemptions > 0


def test_trees_that_grow_anew_are_replayed_with_their_own_ancestors(
    folder: Path, reference: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalties look at what stands above a node: a step that was recorded for another tree knows this one's."""
    penalties: dict[str, Any] = {"repetition_penalty": 1.5, "presence_penalty": 0.7, "frequency_penalty": 0.4}
    jobs = [(prompt, SamplingParams(temperature=0.0, max_tokens=40, **penalties)) for prompt in prompts(8, shared=9)]
    wanted = run(engine(folder, 1), jobs)
    served = engine(folder, 16)
    recorded = record(served)
    trees: set[Tree] = set()
    draft, turn = served.planner.draft, iter(range(10**6))

    def restless(nodes: float, depth: int | None = None) -> Draft:
        """Another tree at each step, of as many nodes."""
        made = draft(nodes, depth)
        choices = ((), *((rank,) for rank in range(8)), *((0,) * d for d in range(2, 4)))
        choices = (*choices, *((next_rank, 0) for next_rank in range(1, 8)))
        rest = [(a, b) for a in range(8) for b in range(1, 8)]
        shift = next(turn) % len(rest)
        choices = (*choices, *(rest[shift:] + rest[:shift]))[: made.tree.num_nodes]
        trees.add(Tree(choices))
        return Draft(Tree(choices), made.nodes)

    monkeypatch.setattr(served.planner, "draft", restless)
    monkeypatch.setattr(served.planner, "choose", lambda rows, prompt_tokens=0: served.planner.draft(16))
    assert run(served, jobs) == wanted
    assert len(trees) > 20
    assert len({key[1] for key in recorded._steps if key[1] > 1}) <= 4  # few recordings, each for many trees
    assert served.stats().accepted_tokens > 0


def kernels(used: set[str]) -> TorchOps:
    """A step's own operations by kernels, and the model's as on a CPU; it says in `used` which kernels were."""
    from manyheads.ops.triton import TritonOps

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            used.add(name)
            return function(*args)

        return called

    triton, ops = TritonOps(), TorchOps()
    for name in ("expand", "settle", "compact", "propose", "argmax", "best"):
        function = counted(name, getattr(triton, name))
        setattr(triton, name, function)  # settling compacts
        setattr(ops, name, function)
    return ops


@pytest.mark.skipif(not INTERPRETED, reason="the engine's tests are on the CPU")
@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("tree_size", [1, 4])
def test_text_is_the_same_with_kernels(folder: Path, tree_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees, what is kept and candidates as on a GPU, in steps with and without a graph; the model as on a CPU."""
    pytest.importorskip("triton")
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
    used: set[str] = set()
    ops = kernels(used)
    served = engine(folder, tree_size, num_blocks=24)
    recorded = record(served, ops)
    monkeypatch.setattr(served.runner.model, "ops", ops)
    assert run(served, jobs, rate=0.4) == wanted
    assert recorded._steps
    assert used == {"expand", "settle", "argmax", *(() if tree_size == 1 else ("compact", "propose", "best"))}


def test_padding() -> None:
    assert [padded_rows(n, 256, ROWS) for n in (1, 3, 5, 33, 200)] == [1, 3, 6, 40, 256]
    assert [padded_rows(n, 256, TREE_ROWS) for n in (1, 3, 5, 33, 200)] == [1, 4, 8, 48, 208]
    assert padded_rows(5, 5, ROWS) == 5
    assert padded_rows(300, 512, ROWS) == 320
