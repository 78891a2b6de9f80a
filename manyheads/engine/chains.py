"""What a drafter that reads all tokens of texts is told of those that come in chunks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from manyheads.engine.step import Chunk
from manyheads.engine.step_run import StepRun, chunk_rows
from manyheads.speculation.drafter import Chain, Kept


def chunk_chain(run: StepRun, chunks: list[Chunk]) -> Chain:
    """The tokens of chunks, without what the base makes of them."""
    rows = chunk_rows(run.state, chunks)
    inflight = run.chain(rows)
    following: list[int] = []
    for request, size in ((chunk.request, chunk.num_inflight) for chunk in chunks):
        behind = request.tokens[request.cached_len + 1 : request.cached_len + size + 1]
        following += behind + [0] * (size - len(behind))  # the last one is drawn in this step
    return Chain(
        group=run.chain_group(rows, inflight),
        states=torch.empty(0),
        following=run.state.tensor(following),
        position=inflight.position,
        slots=inflight.slots,
    )


def told_of(chain: Chain, states: Tensor, others: Kept | None, hidden: Tensor, ends: Tensor) -> Kept:
    """What a step kept of chunks, the tokens of prompts that go on included.

    Args:
        states: [T, k, hidden], of the chunks' tokens and perhaps more.
        others: rows whose prompts ended.
        hidden: [R, hidden], of their last tokens, which stand at
        ends: [R] int64.
    """
    if others is None:
        none = ends.new_zeros(0, 1)
        others = Kept(ends, hidden, none, none)
    chain.following[ends] = others.tokens[:, 0].clamp(min=0)
    chain = replace(chain, states=states[: len(chain.following)])
    return replace(others, chains=(chain,), last=ends)
