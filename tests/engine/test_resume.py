"""A request that another engine began goes on with the same text, the same log-probabilities and the same end."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyheads import EngineConfig, SamplingParams
from manyheads.engine.build import build_engine
from manyheads.engine.engine import Engine
from manyheads.errors import RequestError
from manyheads.request import EngineRequest, RequestDelta
from tests.eagle3 import drafter_of
from tests.tiny import save_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
CASES = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=20),
    "sampled": SamplingParams(temperature=0.9, seed=11, max_tokens=20, top_p=0.95, top_k=12),
    "penalties": SamplingParams(
        temperature=0.7, seed=4, max_tokens=20, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4
    ),
    "log-probabilities": SamplingParams(temperature=0.0, max_tokens=20, logprobs=3),
    "bias and stops": SamplingParams(
        temperature=0.8, seed=2, max_tokens=30, min_tokens=10, stop_token_ids=(7,), logit_bias={7: 1.0}
    ),
    "to the end of the context": SamplingParams(temperature=0.8, seed=3),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder)
    return folder


def engine(folder: Path, tree_size: int, drafter: str = "medusa") -> Engine:
    """Every request finds an empty cache, as the first of an engine does."""
    settings = {"seed": 0, "max_num_batched_tokens": 16, "block_size": 4, "num_blocks": 200, "num_threads": 1}
    settings |= {"tree_size": tree_size, "prefix_caching": False}
    heads = str(drafter_of(folder, drafter))
    return build_engine(EngineConfig(model=str(folder), heads=heads, dtype="float32", **settings))


def run(served: Engine, *requests: dict[str, object]) -> list[list[RequestDelta]]:
    """What comes of requests that run side by side."""
    for i, fields in enumerate(requests):
        served.add_request(EngineRequest(request_id=str(i), prompt_token_ids=PROMPT, **fields))  # type: ignore[arg-type]
    deltas: list[list[RequestDelta]] = [[] for _ in requests]
    while served.has_work():
        for delta in served.step():
            deltas[int(delta.request_id)].append(delta)
        served.check_integrity()
    return deltas


@pytest.fixture(scope="module")
def pair(tiny: Path, overlaps: bool, request: pytest.FixtureRequest) -> tuple[Engine, Engine]:
    """Of the same settings."""
    return engine(tiny, *request.param), engine(tiny, *request.param)


@pytest.mark.parametrize(
    ("pair", "case"),
    [((1, "medusa"), case) for case in CASES]
    + [((8, "medusa"), case) for case in CASES]
    + [((5, "eagle3"), case) for case in ("greedy", "sampled")],
    indirect=["pair"],
    ids=str,
)
def test_it_goes_on_as_if_nothing_had_happened(pair: tuple[Engine, Engine], case: str) -> None:
    params, (first, second) = CASES[case], pair
    (whole,) = run(first, {"params": params})
    tokens = [token for delta in whole for token in delta.new_token_ids]
    logprobs = [entry for delta in whole for entry in delta.logprobs or ()]
    cuts = sorted({1, 2, 7, len(tokens) // 2, len(tokens) - 1})
    begun = [{"params": params, "output_token_ids": tokens[:cut], "num_steps": cut, "resumes": True} for cut in cuts]
    for cut, rest in zip(cuts, run(second, *begun), strict=True):
        assert [token for delta in rest for token in delta.new_token_ids] == tokens[cut:]
        assert (rest[-1].finish_reason, rest[-1].stop_token_id) == (whole[-1].finish_reason, whole[-1].stop_token_id)
        assert cut < rest[-1].num_steps <= len(tokens)
        again = [entry for delta in rest for entry in delta.logprobs or ()]
        assert [entry.token_id for entry in again] == [entry.token_id for entry in logprobs[cut:]]
        for entry, other in zip(again, logprobs[cut:], strict=True):
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert entry.rank == other.rank
    assert second.stats().prompt_tokens == 0  # the prompt was counted by the engine that began with it


@pytest.mark.parametrize("output", [[1, 99], [-1], list(range(10))])
def test_what_no_engine_said_is_refused(tiny: Path, output: list[int]) -> None:
    with pytest.raises(RequestError):
        run(engine(tiny, 1), {"params": SamplingParams(max_tokens=10), "output_token_ids": output})
