"""How the host fills the rows' state on the device: what a request brings when its row begins, and its pages."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.batch import RowState
from manyheads.engine.bans import fill_tail, move_tails, needs_tail
from manyheads.engine.step import Request
from manyheads.kv_cache import KVCache
from manyheads.speculation.drafter import Drafter

LEAST_TEMPERATURE = 1e-30
"""Logits over a temperature below this may be infinite. Above it, noise already counts for nothing."""


def admit(state: RowState, drafter: Drafter | None, requests: list[Request]) -> None:
    """Fill the rows of admitted (or re-admitted) requests."""
    if not requests:
        return
    ints, floats = [], []
    for request in requests:
        p = request.params
        # a preempted request may have all but its last token in the cache: that one is the root then
        lengths = [request.row, request.cached_len, request.tokens[-1]]
        top_k = p.top_k if p.top_k > 0 else state.vocab_size
        ints.append([*lengths, request.seed, request.prompt_len + p.min_tokens, top_k, request.adapter])
        typical = [p.typical_epsilon, p.typical_alpha]
        penalties = [p.repetition_penalty, p.presence_penalty, p.frequency_penalty]
        temperature = 0.0 if p.greedy else max(p.temperature, LEAST_TEMPERATURE)
        floats.append([temperature, p.top_p, p.min_p, *typical, *penalties, float(p.speculative)])
    values = state.tensor(ints)
    rows = values[:, 0]
    state.cached_len[rows] = values[:, 1]
    state.drafts[rows, 0] = values[:, 2]
    state.ints[rows] = values[:, 3:]
    state.forget_candidates(rows)
    state.floats[rows] = state.tensor(floats, torch.float32)
    for request in requests:
        if drafter is not None:
            drafter.admit(state, request.row, request.tokens)
        if has_penalties(request):
            _count_known(state, request)
        if needs_tail(request.params):
            fill_tail(state, request)


def rewind(state: RowState, requests: list[Request]) -> None:
    """Set the lengths of rows back to those of their requests."""
    where = state.tensor([[request.row, request.cached_len] for request in requests])
    state.cached_len[where[:, 0]] = where[:, 1]


def clear(state: RowState) -> None:
    """Rows hold nothing, in no pages."""
    state.cached_len.zero_()
    state.page_table.zero_()


def sync_pages(state: RowState, requests: list[Request]) -> None:
    """Bring the device's page tables up to date with the pages that the requests hold."""
    rows: list[int] = []
    columns: list[int] = []
    pages: list[int] = []
    for request in requests:
        table = request.table
        new = table.pages[table.num_synced :]
        if new:
            rows += [request.row] * len(new)
            columns += range(table.num_synced, len(table.pages))
            pages += new
            table.num_synced = len(table.pages)
    if rows:
        where = state.tensor([rows, columns, pages])
        state.page_table[where[0], where[1]] = where[2]


def sync_companions(state: RowState, cache: KVCache, news: list[tuple[int, list[int]]]) -> None:
    """Tell the device which companions pages have.

    Args:
        news: pages that have new ones, and these.
    """
    if news:
        assert cache.companions is not None
        where = state.tensor([[page, *companions] for page, companions in news])
        cache.companions[:, where[:, 0]] = where[:, 1:].T


def has_penalties(request: Request) -> bool:
    """Whether its parameters need to know which tokens stand in its text, and how often."""
    p = request.params
    return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0


def count_output(state: RowState, requests: list[Request], rows: Tensor, emitted: Tensor, gained: Tensor) -> None:
    """Add what rows with penalties gained to their counts, and what rows with bad runs gained to their tails.

    Args:
        rows: [R] int64, slots of the row state; there may be more than requests.
        emitted: [R, W] int64, tokens.
        gained: [R, 1] int64, how many of them hold.
    """
    move_tails(state, requests, rows, emitted, gained)
    with_penalties = [i for i, request in enumerate(requests) if has_penalties(request)]
    if not with_penalties:
        return
    _, output_count = state.count_tokens()
    which = state.tensor(with_penalties)
    emitted, gained = emitted[which], gained[which]
    counted = torch.arange(emitted.shape[1], device=state.device) < gained
    at = (rows[which, None].expand_as(emitted), emitted)
    output_count.index_put_(at, counted.to(torch.int32), accumulate=True)


def _count_known(state: RowState, request: Request) -> None:
    """Which tokens a row's prompt and output hold, for its penalties."""
    prompt_seen, output_count = state.count_tokens()
    row = request.row
    prompt_seen[row] = False
    prompt_seen[row, state.tensor(request.tokens[: request.prompt_len])] = True
    output_count[row] = 0
    output = state.tensor(request.tokens[request.prompt_len :])
    output_count[row].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
