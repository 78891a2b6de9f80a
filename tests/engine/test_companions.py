"""Models whose layers are in groups, with pages for a part of what is asked: K/V in 8 bits, a GGUF file, and drafters
of which one keeps K/V of its own. No text and no guess depends on which companions a page has had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from manyheads import SamplingParams
from manyheads.batch import RowState
from manyheads.engine.engine import Engine
from manyheads.engine.runner import Runner
from manyheads.kv_cache import KVCache
from manyheads.models.registry import read_config
from manyheads.request import EngineRequest
from manyheads.speculation.drafter import Kept
from manyheads.speculation.eagle3.drafter import Eagle3Drafter
from tests.eagle3 import drafter_of, make_drafter
from tests.engine.test_eagle3 import check_row
from tests.engine.test_exactness import engine, prompts, run
from tests.engine.test_families import save
from tests.gguf.test_models import CASES
from tests.gguf.write import tiny, write
from tests.tiny import HIDDEN, save_heads

MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {"num_hidden_layers": 5, "layer_types": [*["sliding_attention"] * 4, "full_attention"]},
    "mistral with a window": {},
}
"""By name, and what is changed. With a drafter's layer, Gemma 3 has a group of that and its last layer, and two groups
of two; Mistral, one of that alone and two of one."""
JOBS = [
    (prompt, SamplingParams(temperature=i % 2, seed=i, max_tokens=22 + 2 * i, ignore_eos=True))
    for i, prompt in enumerate(prompts(8, shared=13))
]
Saved = dict[str, tuple[Path, PreTrainedModel]]


@pytest.fixture(autouse=True)
def costs_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """All trees are of a size that is given."""
    monkeypatch.setattr("manyheads.engine.build.measure_costs", lambda *args: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    made = {}
    for name, changes in MODELS.items():
        folder = tmp_path_factory.mktemp("grouped") / "model"
        made[name] = folder, save(folder, name, **changes)
    return made


def with_room(folder: Path, **settings: Any) -> list[list[int]]:
    """Everyone's tokens where there are pages for all, without trees and shared prefixes, prompts in one piece."""
    return run(engine(folder, 1, num_blocks=400, max_num_batched_tokens=256, prefix_caching=False, **settings), JOBS)


def guess(served: Engine, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the drafter, beside what it does, guess what comes, as its second candidate and beside a wrong first one, so
    that accepted nodes are not the first of their trees and have to move. How many do is added to the list returned."""
    runner = served.runner
    assert isinstance(runner, Runner)
    drafter, propose, move, moved = runner.drafter, runner.drafter.propose, KVCache.move, list[int]()
    ranks = len(drafter.prior[0])
    template = [divmod(column, ranks) for column in range(drafter.shape.num_candidates)]
    if isinstance(drafter, Eagle3Drafter):
        template = [(len(choice) - 1, choice[-1]) for choice in drafter._template.choices]

    def guessing(state: RowState, kept: Kept, depth: int, nodes: float) -> tuple[Tensor, Tensor]:
        tokens, chances = (x.clone() for x in propose(state, kept, depth, nodes))
        asked = {request.row: int(request.request_id) for request in served.scheduler.running}
        for at, row in enumerate(kept.index.tolist()):
            if row in asked:
                known = JOBS[asked[row]][0] + texts[asked[row]]
                begin = int(state.cached_len[row]) + 1
                for column, (below, rank) in enumerate(template):
                    right = known[begin + below] if begin + below < len(known) else 0
                    tokens[at, column] = (right + rank - 1) % served.ready.vocab_size
                    chances[at, column] = (0.4, 0.6)[rank] if rank < 2 else 0.0
        return tokens, chances

    def moving(self: KVCache, source: Tensor, destination: Tensor) -> None:
        moved.append(len(source))
        move(self, source, destination)

    monkeypatch.setattr(drafter, "propose", guessing)
    monkeypatch.setattr(KVCache, "move", moving)
    return moved


def check_stress(served: Engine, num_companions: int) -> None:
    """An engine had to set rows back, took prefixes from the cache, and accepted guesses."""
    stats = served.stats()
    assert served.scheduler.pages.num_companions == num_companions
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    assert stats.accepted_tokens > 0


@pytest.mark.parametrize(
    ("name", "kv_dtype", "drafter", "num_companions", "num_blocks", "overlapping"),
    [
        ("gemma3", "int8", "medusa", 4, 56, False),
        ("mistral with a window", "fp8", "eagle3", 2, 50, True),
    ],
)
def test_text_is_that_of_an_engine_with_room(
    saved: Saved,
    name: str,
    kv_dtype: str,
    drafter: str,
    num_companions: int,
    num_blocks: int,
    overlapping: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Greedy and sampled, with random arrivals, chunks of 8 tokens, a shared prefix and trees of 12 nodes."""
    folder, _ = saved[name]
    wanted = with_room(folder, kv_cache_dtype=kv_dtype)
    monkeypatch.setattr(Runner, "overlaps", overlapping)
    heads = str(drafter_of(folder, drafter))
    served = engine(folder, 12, kv_cache_dtype=kv_dtype, heads=heads, num_blocks=num_blocks)
    assert served.ready.drafter == drafter
    moved = guess(served, wanted, monkeypatch)
    assert run(served, JOBS, rate=0.5) == wanted
    check_stress(served, num_companions)
    assert sum(moved) > 10


def test_guesses_are_the_references(saved: Saved) -> None:
    """A drafter's own K/V is whole, whatever pages and companions its rows have had."""
    folder, model = saved["gemma3"]
    weights = make_drafter(folder.parent / "another", read_config(folder))
    served = engine(folder, 12, heads=str(folder.parent / "another"), num_blocks=40)
    waiting, looked_at, steps = [*enumerate(JOBS)], 0, 0
    while waiting or served.has_work():
        if waiting and steps % 3 == 0:
            i, (prompt, params) = waiting.pop(0)
            served.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
        served.step()
        steps += 1
        for request in served.scheduler.running:
            if steps % 6 == 0 and request.decoding and request.has_candidates:
                looked_at += check_row(served, request, model, weights)
    assert looked_at > 20
    check_stress(served, 2)


def test_text_of_a_gguf_file_is_that_of_an_engine_with_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layers of which one looks to the beginning."""
    name, changes, keys = CASES["gemma3"]
    path = write(tmp_path / "model.gguf", tiny(name, **changes), more=keys)
    save_heads(tmp_path, HIDDEN)
    served = engine(path, 12, heads=str(tmp_path / "heads"), num_blocks=66)
    wanted = with_room(path)
    moved = guess(served, wanted, monkeypatch)
    assert run(served, JOBS, rate=0.5) == wanted
    check_stress(served, 5)
    assert sum(moved) > 10
