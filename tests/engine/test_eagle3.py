"""EAGLE-3 drafters in the engine: what they guess is what the reference guesses, and no text changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from manyheads.attention.base import Group
from manyheads.batch import Guesses, Level, OpenNodes
from manyheads.config import ConfigError
from manyheads.engine.engine import Engine
from manyheads.engine.runner import Runner
from manyheads.engine.step import Request
from manyheads.models.registry import read_config
from manyheads.ops.triton import TritonOps
from manyheads.request import EngineRequest, SamplingParams
from manyheads.speculation.eagle3.checkpoint import Eagle3Weights
from manyheads.speculation.eagle3.drafter import Eagle3Drafter
from tests.eagle3 import ReferenceEagle3, make_drafter
from tests.engine.test_exactness import engine, prompts, run
from tests.engine.test_graphs import record
from tests.kernels import INTERPRETED
from tests.tiny import save_model

DRAFT_VOCAB = 11
VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm_before_residual": True, "fc_norm": True, "norm_output": True, "rope_theta": 77.0},
    {"norm_before_fc": True, "qk_norm": True, "format": "speculators", "draft_vocab": None, "embedding": "random"},
]


def drafter(folder: Path, at: Path, **changes: Any) -> Eagle3Weights:
    return make_drafter(at, read_config(folder), **({"draft_vocab": DRAFT_VOCAB} | changes))


def serve(folder: Path, at: Path, tree_size: int | None = 12, **settings: Any) -> Engine:
    return engine(folder, tree_size, heads=str(at), **settings)


def runner_of(served: Engine) -> Runner:
    assert isinstance(served.runner, Runner)
    return served.runner


@torch.no_grad()
def states_of(reference: LlamaForCausalLM, tokens: list[int], layers: tuple[int, ...]) -> Tensor:
    """[T, k · hidden], the inputs of the base's layers; that of layer n is what the final norm reads."""
    seen: list[Tensor] = []
    hook = reference.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    states = reference.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    hook.remove()
    return torch.cat([seen[0] if i == len(states) - 1 else states[i][0] for i in layers], dim=-1)


def check_row(served: Engine, request: Request, base: LlamaForCausalLM, weights: Eagle3Weights) -> int:
    """A row's candidates are those of the reference, of which each pass goes on from the one before; how many."""
    runner = runner_of(served)
    guesses = runner.drafter
    assert isinstance(guesses, Eagle3Drafter)
    assert weights.config.layer_ids is not None
    reference = ReferenceEagle3(weights, base.model.embed_tokens.weight.detach())
    states = states_of(base, request.tokens[: request.cached_len], weights.config.layer_ids)
    known = torch.tensor(request.tokens[1 : request.cached_len + 1])
    template, row = guesses._template, request.row
    tokens, chances = runner.state.candidates[row].tolist(), runner.state.chances[row, 1:]
    count = 0
    for parent, children in template.children.items():
        offered = chances[children]
        if not offered.any():
            continue
        path = [tokens[template.index[parent[: depth + 1]]] for depth in range(len(parent))]
        wanted = reference.after(states, known, path).softmax(dim=-1)
        best = wanted.topk(len(children))
        assert [tokens[c] for c in children] == best.indices.tolist(), (parent, path)
        assert torch.allclose(offered, best.values, atol=1e-4), (parent, path)
        count += 1
    return count


@pytest.mark.parametrize("changes", VARIANTS, ids=["published", "3.1", "Qwen3's layer"])
@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
def test_candidates_are_the_references(
    folder: Path, reference: LlamaForCausalLM, tmp_path: Path, changes: dict[str, Any], recorded: bool
) -> None:
    """Of rows that come and go, prompts in chunks, trees that are accepted in part, and steps without trees."""
    weights = drafter(folder, tmp_path / "drafter", **changes)
    served = serve(folder, tmp_path / "drafter", prefix_caching=False, num_blocks=80)
    if recorded:
        record(served)
    for i, prompt in enumerate(prompts(7)):
        params = SamplingParams(temperature=i % 2, seed=i, max_tokens=9 + i)
        served.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
    looked_at = deep = 0
    while served.has_work():
        served.step()
        for request in served.scheduler.running:
            if request.decoding and request.has_candidates:
                count = check_row(served, request, reference, weights)
                looked_at += 1
                deep += count > 1
    assert looked_at > 50
    assert deep > 25  # nodes below the root were opened


def test_no_row_of_a_recorded_step_is_shorter_than_nothing(
    folder: Path, reference: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pads a step gains tokens and stays where it is, at 0; kernels would read in front of its pages."""
    drafter(folder, tmp_path / "drafter")
    served = serve(folder, tmp_path / "drafter")
    record(served)
    guesses = runner_of(served).drafter
    assert isinstance(guesses, Eagle3Drafter)
    plan, shortest = guesses._attention.plan, list[int]()

    def observed(groups: list[Group], positions: Tensor, slots: Tensor) -> None:
        shortest.append(min(int(group.cached_len.min()) for group in groups))
        plan(groups, positions, slots)

    monkeypatch.setattr(guesses._attention, "plan", observed)
    for i, prompt in enumerate(prompts(3)):  # steps are recorded for 1, 2 and 4 rows
        params = SamplingParams(temperature=0.0, max_tokens=6)
        served.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
    while served.has_work():
        served.step()
    assert min(shortest) == 0


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the other tests run with kernels")
def test_candidates_of_kernels_are_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_model(tmp_path / "model", head_dim=16)
    weights = drafter(tmp_path / "model", tmp_path / "drafter")
    ops = TritonOps()
    monkeypatch.setattr(TritonOps, "records", False)
    monkeypatch.setattr("manyheads.engine.blueprint.ops_for", lambda device: ops)
    monkeypatch.setattr("manyheads.engine.build.measure_costs", lambda *args: None)  # slow here
    served = serve(tmp_path / "model", tmp_path / "drafter", prefix_caching=False)
    for i, prompt in enumerate(prompts(2)):
        params = SamplingParams(temperature=0.0, max_tokens=3)
        served.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt[:9], params=params))
    looked_at = 0
    while served.has_work():
        served.step()
        for request in served.scheduler.running:
            if request.decoding and request.has_candidates:
                looked_at += check_row(served, request, base, weights)
    assert looked_at > 10


def test_statistics_of_the_best_candidates_alone_will_do(
    folder: Path, reference: LlamaForCausalLM, tmp_path: Path
) -> None:
    drafter(folder, tmp_path / "drafter")
    (tmp_path / "drafter" / "tree_statistics.json").write_text('{"accuracy": [[0.5], [0.4]]}')
    jobs = [(prompt, SamplingParams(max_tokens=12, temperature=0.0)) for prompt in prompts(3)]
    served = serve(folder, tmp_path / "drafter", 6)
    assert run(served, jobs) == run(engine(folder, 1), jobs)
    assert served.stats().drafted_tokens > 0


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.0, "speculative": False},
]
JOBS = [
    (prompt, SamplingParams(max_tokens=10 + i, seed=i, **KINDS[i % len(KINDS)]))
    for i, prompt in enumerate(prompts(16, shared=9))
]


@pytest.fixture(scope="module")
def plain(folder: Path, reference: LlamaForCausalLM) -> list[list[int]]:
    """What plain decoding says to JOBS."""
    return run(engine(folder, 1, num_blocks=24), JOBS, rate=0.4)


@pytest.mark.parametrize("tree_size", [2, 7, 24])
@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
def test_text_is_that_of_plain_decoding(
    folder: Path, plain: list[list[int]], tmp_path: Path, tree_size: int, recorded: bool
) -> None:
    """Greedy and sampled, in few pages, with prefixes that are shared and rows that are set back."""
    drafter(folder, tmp_path / "drafter")
    served = serve(folder, tmp_path / "drafter", tree_size, num_blocks=24)
    if recorded:
        record(served).record_passes(8, 128, {})
    assert run(served, JOBS, rate=0.4) == plain
    stats = served.stats()
    assert stats.drafted_tokens > 0
    assert stats.preemptions > 0
    served.check_integrity()


def test_a_planner_that_chooses_nodes_and_passes(
    folder: Path, reference: LlamaForCausalLM, tmp_path: Path, overlaps: bool
) -> None:
    drafter(folder, tmp_path / "drafter")
    jobs = [(prompt, SamplingParams(temperature=0.0, max_tokens=20)) for prompt in prompts(8)]
    wanted = run(engine(folder, 1), jobs)
    served = serve(folder, tmp_path / "drafter", None)
    assert run(served, jobs) == wanted
    assert {draft.passes for draft in served.planner.drafts(1)} == set(range(1, served.ready.draft_depth + 1))


def test_a_request_as_long_as_all_pages_ends(folder: Path, reference: LlamaForCausalLM, tmp_path: Path) -> None:
    """What the drafter needs behind a text is only taken where there is room for it."""
    drafter(folder, tmp_path / "drafter")
    served = serve(folder, tmp_path / "drafter", 12, num_blocks=8, max_model_len=32)
    for length in (1, 8, 25, 31):
        jobs = [([3] * length, SamplingParams(temperature=0.0, ignore_eos=True))]
        assert len(run(served, jobs)[0]) == 32 - length


def test_a_pass_looks_at_the_likeliest_nodes_of_all_rows(
    folder: Path, reference: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter(folder, tmp_path / "drafter")
    served = serve(folder, tmp_path / "drafter", 2, prefix_caching=False, num_blocks=80)
    guesses = runner_of(served).drafter
    assert isinstance(guesses, Eagle3Drafter)
    ops, sizes = guesses.layer.ops, list[tuple[int, int]]()
    open_nodes = ops.open_nodes

    def opening(guesses: Guesses, level: Level, count: int) -> OpenNodes:
        sizes.append((len(guesses.cached_len), count))
        return open_nodes(guesses, level, count)

    monkeypatch.setattr(ops, "open_nodes", opening)
    run(served, [(prompt, SamplingParams(temperature=0.0, max_tokens=9)) for prompt in prompts(4)])
    assert sizes
    assert all(new <= rows for rows, new in sizes)  # trees of two nodes have one beside the root


def test_a_cache_of_another_shape_is_refused(folder: Path, reference: LlamaForCausalLM, tmp_path: Path) -> None:
    drafter(folder, tmp_path / "drafter", num_kv_heads=4)
    with pytest.raises(ConfigError, match="4 K/V heads of 8, its base 2 of 8"):
        serve(folder, tmp_path / "drafter")
