"""A request whose numbers are not finite ends alone: the others' texts are what they are without it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manyheads import EngineConfig, SamplingParams
from manyheads.config import ConfigError
from manyheads.engine.build import build_engine
from manyheads.engine.engine import Engine
from manyheads.engine.runner import Runner
from manyheads.request import EngineRequest, RequestDelta
from manyheads.speculation.draft import NO_DRAFT
from tests.tiny import VOCAB, save_model

POISON = 13
"""The embedding of this token is broken."""
GOOD = [token for token in range(VOCAB) if token != POISON]
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, seed=5),
    SamplingParams(temperature=0.0, frequency_penalty=0.4, logprobs=2),
    SamplingParams(temperature=0.9, seed=7, acceptance="typical"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder)
    return folder


def engine(folder: Path, poison: float | None = None, **settings: Any) -> Engine:
    """Checkpoints with such numbers are refused; a row gets them where something overflows."""
    some = {
        "seed": 0,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "block_size": 4,
        "num_blocks": 80,
        "tree_size": 8,
    }
    made = build_engine(EngineConfig(model=str(folder), dtype="float32", num_threads=1, **(some | settings)))
    if poison is not None:
        assert isinstance(made.runner, Runner)
        made.runner.model.embedding[POISON, 3] = poison
    return made


def run(served: Engine, jobs: dict[str, tuple[list[int], SamplingParams]]) -> dict[str, list[RequestDelta]]:
    for name, (prompt, params) in jobs.items():
        served.add_request(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))
    deltas: dict[str, list[RequestDelta]] = defaultdict(list)
    while served.has_work():
        for delta in served.step():
            deltas[delta.request_id].append(delta)
        served.check_integrity()
    return deltas


def good_jobs() -> dict[str, tuple[list[int], SamplingParams]]:
    """Rows that never draw the poison, though their drafters may propose it."""
    bias = {POISON: -100.0}
    jobs = {}
    for i in range(6):
        params = PARAMS[i % 3]  # typical acceptance gives other texts with other trees
        fields = {f: getattr(params, f) for f in params.__struct_fields__} | {"logit_bias": bias, "max_tokens": 12}
        jobs[f"good {i}"] = ([GOOD[(i * 7 + k) % len(GOOD)] for k in range(5 + i)], SamplingParams(**fields))
    return jobs


def tokens(deltas: list[RequestDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.new_token_ids]


@pytest.fixture(scope="module", params=[{}, {"kv_cache_dtype": "int8"}, {"quantization": "int8"}], ids=str)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture(scope="module")
def alone(tiny: Path, settings: dict[str, Any], overlaps: bool) -> dict[str, list[RequestDelta]]:
    """What the good jobs say without a bad one beside them."""
    return run(engine(tiny, **settings), good_jobs())


@pytest.mark.parametrize(("place", "poison"), [(0, float("nan")), (9, float("inf")), (23, float("nan"))])
def test_others_never_notice(
    tiny: Path, alone: dict[str, list[RequestDelta]], settings: dict[str, Any], place: int, poison: float
) -> None:
    prompt = [GOOD[k % len(GOOD)] for k in range(24)]
    prompt[place] = POISON
    served = engine(tiny, poison, **settings)
    for params in PARAMS:
        beside = run(served, {"bad": (prompt, params)} | good_jobs())
        last = beside["bad"][-1]
        assert (last.finish_reason, last.error_kind) == ("error", "model")
        assert "not finite for the prompt" in (last.error or "")
        assert tokens(beside["bad"]) == []
        for name in alone:
            assert tokens(beside[name]) == tokens(alone[name])
            assert beside[name][-1].finish_reason == "length"
    # what it left behind does not matter to who gets its pages and its row next
    again = run(served, good_jobs())
    assert {name: tokens(again[name]) for name in alone} == {name: tokens(alone[name]) for name in alone}


@pytest.mark.parametrize("aborts", [False, True])
@pytest.mark.parametrize("place", [0, 9, 30])
def test_nobody_shares_what_is_broken(tiny: Path, overlaps: bool, place: int, aborts: bool) -> None:
    """Those who come with the same prompt while it is being computed, or after it was given up in its middle."""
    prompt = [GOOD[k % len(GOOD)] for k in range(40)]
    prompt[place] = POISON
    other = ([*prompt[: place // 4 * 4], *GOOD[:6]], good_jobs()["good 1"][1])
    alone = run(engine(tiny), {"other": other})["other"]
    for num_steps in (1, 2, 3):
        served = engine(tiny, float("nan"))
        served.add_request(EngineRequest(request_id="first", prompt_token_ids=prompt, params=PARAMS[0]))
        seen = [delta for _ in range(num_steps) for delta in served.step()]
        if aborts:
            served.abort("first")
        deltas = run(served, {"second": (prompt, PARAMS[1]), "other": other})
        first, second = (seen + deltas["first"])[-1], deltas["second"]
        assert first.finish_reason == "error" or (aborts and first.finish_reason == "abort")
        assert (tokens(second), second[-1].error_kind) == ([], "model")
        assert "not finite for the prompt" in (second[-1].error or "")
        assert tokens(deltas["other"]) == tokens(alone)


def test_a_row_that_breaks_on_the_way_keeps_what_it_has(tiny: Path, overlaps: bool) -> None:
    """The poison is drawn at once, and breaks what comes behind it."""
    params = SamplingParams(temperature=0.0, logit_bias={POISON: 100.0}, max_tokens=9, logprobs=1)
    deltas = run(engine(tiny, float("nan")), {"bad": (GOOD[:6], params)})["bad"]
    assert tokens(deltas) == [POISON]
    assert (deltas[-1].finish_reason, deltas[-1].error_kind) == ("error", "model")
    assert "not finite after 1 tokens" in (deltas[-1].error or "")


@pytest.mark.parametrize("drafter", ["medusa", "ngram"])
def test_who_gets_a_broken_rows_place_knows_nothing_of_it(
    tiny: Path, overlaps: bool, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that was launched before anyone knew guesses by a text with a token that could not be drawn. After a plain
    step the next one has no guesses yet: those fill up its tree, and its penalties look at all of them."""
    job = {"good 2": good_jobs()["good 2"]}
    served = engine(tiny, float("nan"), drafter=drafter)
    params = SamplingParams(temperature=0.0, logit_bias={POISON: 100.0}, max_tokens=60)
    last = run(served, {"bad": (GOOD, params)})["bad"][-1]
    assert (last.finish_reason, last.error_kind) == ("error", "model")
    draft, plain = served.planner.draft(8), iter([NO_DRAFT])
    monkeypatch.setattr(served.planner, "choose", lambda *args: next(plain, draft))
    again = run(served, job)["good 2"]
    assert tokens(again) == tokens(run(engine(tiny, drafter=drafter), job)["good 2"])


def test_weights_that_overflow_are_told_in_a_line(tmp_path: Path) -> None:
    save_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"].fill_(3e38)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="the model's logits are not finite in float32"):
        engine(tmp_path, tree_size=None)


def test_the_greatest_that_is_no_number_is_no_token() -> None:
    from manyheads.ops import ops_for

    logits = torch.tensor([[1.0, 3.0, 3.0], [1.0, float("nan"), 2.0], [float("inf"), 0.0, 1.0], [float("-inf")] * 3])
    assert ops_for(torch.device("cpu")).argmax(logits).tolist() == [1, -1, -1, -1]
