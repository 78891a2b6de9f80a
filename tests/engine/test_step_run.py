"""Where the tokens of a step stand, against plain Python."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from manyheads.attention.base import Heads
from manyheads.batch import RowState
from manyheads.engine.step import Chunk, Request
from manyheads.engine.step_run import ChunkRows, StepRun, chunk_numbers, gain_sizes
from manyheads.request import SamplingParams
from manyheads.speculation.draft import NO_DRAFT, SIZES, Draft
from manyheads.speculation.tree import ROOT, Tree
from tests.ops.rows import CPU, OPS, Case
from tests.tiny import model_config


def step_run(case: Case, state: RowState) -> StepRun:
    """Without a model."""
    config = model_config()
    rope = (torch.zeros(1), torch.zeros(1))
    heads = Heads(num_heads=config.num_heads, eps=1e-6, ropes=dict.fromkeys(range(config.num_layers), rope))
    model: Any = SimpleNamespace(config=config, heads=heads)
    return StepRun(model, None, OPS, state, case.cache(state))


def chunk(name: str, row: int, tokens: list[int], cached: int, size: int) -> Chunk:
    request = Request(
        request_id=name,
        params=SamplingParams(),
        tokens=tokens,
        prompt_len=len(tokens),
        max_len=999,
        stop_ids=frozenset(),
        seed=0,
        held_row=row,
        cached_len=cached,
    )
    return Chunk(request, size, cached + size == len(tokens))


def chunk_rows(chunks: list[Chunk], num_tokens: int, dummies: list[int]) -> ChunkRows:
    """Chunks, and behind them dummy rows of which the last one pads."""
    numbers, starts = chunk_numbers(chunks, num_tokens, len(chunks) + len(dummies) - 1)
    tokens, row, place = torch.tensor(numbers).unbind()
    ends = [*[starts[-1]] * (len(dummies) - 1), num_tokens][: len(dummies)]
    return ChunkRows(
        tokens=tokens,
        row=row,
        place=place,
        index=torch.tensor([*(chunk.request.row for chunk in chunks), *dummies]),
        row_start=torch.tensor(starts + ends, dtype=torch.int32),
        max_tokens=num_tokens,
        max_cached_len=99,
    )


@pytest.mark.parametrize("n", [1, 2, 9, 100])
@pytest.mark.parametrize("cached", [0, 3, 4, 21])
def test_known_tokens_are_placed_one_after_the_other(n: int, cached: int) -> None:
    case = Case(ROOT, [2], 0.0, 4, 0, 0)
    state = case.state()
    state.cached_len[2] = cached
    n = min(n, state.page_table.shape[1] * 4 - cached)
    tokens = torch.randint(0, 50, (n,))
    chunks = [chunk("one", 2, [0] * cached + tokens.tolist(), cached, n)]
    inflight = step_run(case, state).chain(chunk_rows(chunks, n, []))
    assert torch.equal(inflight.tokens, tokens)
    assert inflight.index.tolist() == [2]
    assert inflight.row_start.tolist() == [0, n]
    assert inflight.position.tolist() == list(range(cached, cached + n))
    assert inflight.slots.tolist() == [case.slot(state, 0, i) for i in range(n)]
    assert inflight.bits.tolist() == [0] * n


def test_chunks_of_several_rows_and_what_pads_them() -> None:
    """The tokens that are left over are the dummy row's, at its beginning, and their slot is the dummy page's first."""
    case = Case(ROOT, [3, 0, 5], 0.0, 4, 0, 1)
    state = case.state()
    state.cached_len[:4] = torch.tensor([6, 0, 0, 1])
    chunks = [chunk("a", 3, [7, 8, 9, 10, 11], 1, 3), chunk("b", 0, [*range(20, 28)], 6, 2)]
    inflight = step_run(case, state).chain(chunk_rows(chunks, 9, [5, 5]))
    assert inflight.tokens.tolist() == [8, 9, 10, 26, 27, 0, 0, 0, 0]
    assert inflight.index.tolist() == [3, 0, 5, 5]
    assert inflight.row_start.tolist() == [0, 3, 5, 5, 9]
    assert inflight.position.tolist() == [1, 2, 3, 6, 7, 0, 0, 0, 0]
    assert inflight.slots.tolist() == [
        *(case.slot(state, 0, i) for i in range(3)),
        *(case.slot(state, 1, i) for i in range(2)),
        *[0] * 4,
    ]
    assert inflight.bits.tolist() == [0] * 9


def test_sizes_that_the_planner_asks_for() -> None:
    tree = Tree(((), (0,), (1,), (0, 0)))
    assert gain_sizes(3, NO_DRAFT, CPU) is None
    sizes = gain_sizes(3, Draft(tree, 2), CPU)
    assert sizes is not None
    assert sizes.tolist() == [min(int(3 * size), 12) for size in SIZES]
